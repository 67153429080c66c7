"""Stop strings: an answer is the same in one piece, in any pieces and in a stream of tokens."""

import itertools

import pytest

from vlm_jax.config import UserError
from vlm_jax.hub.text.tokenizer import TextStream
from vlm_jax.infer.stop import AnswerText, check_stop, find_stop

EOS = 0
# text of the tokens 1, 2, ...
PIECES = ("a", "b", "ab", "\n", "\n\n")
STOPS = [(), ("\n\n",), ("ba", "ab"), ("bab", "a\n"), ("abab\n", "b\n\n"), ("b",)]


def decode(ids) -> str:
    return "".join(PIECES[i - 1] for i in ids)


def stopped(text: str, stop) -> str:
    """The text before the stop string that is complete first, character by character."""
    for end in range(len(text) + 1):
        starts = [end - len(string) for string in stop if text[:end].endswith(string)]
        if starts:
            return text[: min(starts)]
    return text


def answer_pieces(tokens, stop) -> tuple[list[str], AnswerText]:
    answer = AnswerText(TextStream(decode), (EOS,), stop)
    pieces = [answer.feed(token) for token in tokens]
    return [*pieces, answer.end()], answer


@pytest.mark.parametrize("stop", STOPS)
def test_an_answer_ends_before_the_first_complete_stop_string(stop):
    for tokens in itertools.product(range(1, len(PIECES) + 1), repeat=4):
        text = decode(tokens)
        expected = stopped(text, stop)
        pieces, answer = answer_pieces(tokens, stop)
        assert "".join(pieces) == expected
        assert answer.is_ended == (find_stop(text, stop) is not None)
        pieces, answer = answer_pieces([*tokens[:2], EOS, *tokens[2:]], stop)
        assert "".join(pieces) == stopped(decode(tokens[:2]), stop)
        assert answer.is_ended


def test_text_is_withheld_only_while_it_may_become_a_stop_string():
    pieces, _ = answer_pieces([1, 2, 4, 1, 4], ["\n\n"])
    assert pieces == ["a", "b", "", "\na", "", "\n"]


@pytest.mark.parametrize(
    ("stop", "message"), [(["a", ""], "stop has an empty text"), ([3], "stop 3: .* must be text")]
)
def test_a_stop_string_is_a_text(stop, message):
    with pytest.raises(UserError, match=message):
        check_stop(stop)
