"""A conversation with a kept KV cache gives the answers to the whole conversation read anew."""

from dataclasses import replace

import numpy as np
import pytest

import vlm_jax
from vlm_jax.config import Data
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.hub.text.prompts import ChatPrompt
from vlm_jax.infer.answer import AnswerOptions
from vlm_jax.infer.run import RunProcessor
from vlm_jax.infer.session import Session
from vlm_jax.nn.vlm import VLM
from vlm_jax.testing import random_params, tiny

NEW = 6
QUESTIONS = ("what shape is it?", "and the color?", "is it red?")
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (20, 24, 3)).astype(np.uint8) for _ in range(3)]
TOKENIZER = Tokenizer.train([*QUESTIONS, "USER: ASSISTANT: yes no"], 290)


def model_of(kind: str, template: str = "vicuna"):
    """A model with random parameters, and the processor of its run."""
    cfg = tiny(kind, data=Data(source="conversations", template=template, augment=()))
    decoder = replace(cfg.decoder, tie_word_embeddings=False, max_positions=400)
    cfg = replace(cfg, decoder=decoder)
    return VLM(cfg.model), random_params(cfg, 0.3), RunProcessor(cfg, TOKENIZER)


def read_anew(model, session: Session, question: str, images=(), **options) -> str:
    """The answer to the next question, by `generate`."""
    turns = (*session.turns, "\n".join([*["<image>"] * len(images), question]))
    prompt = ChatPrompt(turns, session.system)
    shown = [[*session.images, *images]]
    return vlm_jax.generate(*model, [prompt], shown, max_new_tokens=NEW, **options)[0]


@pytest.mark.parametrize("kind", ["unified", "cross_attention", "hybrid"])
def test_turns_and_images_are_answered_as_if_read_anew_and_cost_their_own_tokens(kind):
    model = model_of(kind)
    session = Session(*model, AnswerOptions(max_new_tokens=NEW), system="be brief")
    shown = [IMAGES[:1], IMAGES[1:2], []]
    total = 0
    answers = []
    for question, images in zip(QUESTIONS, shown):
        expected = read_anew(model, session, question, images)
        answer = "".join(session.ask(question, images))
        assert answer == expected
        answers.append(answer)
        prompt = ChatPrompt(tuple(session.turns[:-1]), session.system)
        length = model[2]([prompt], [session.images]).tokens.shape[1]
        # An answer may be tokenized in another way than it was generated.
        assert session.computed_tokens <= length - total + NEW + 1
        assert session.encoded_images == len(images)
        total = length
    assert len(set(answers)) > 1, "the answers are all alike: the test would show little"

    assert session.undo() and session.undo()
    assert session.images == IMAGES[:1] and len(session.turns) == 2
    assert "".join(session.ask(QUESTIONS[1], IMAGES[2:])) == read_anew(
        model, replace_turns(session), QUESTIONS[1], IMAGES[2:]
    )
    session.reset()
    assert not session.undo()
    expected = read_anew(model, session, QUESTIONS[0])
    assert "".join(session.ask(QUESTIONS[0])) == expected


def test_another_conversation_takes_the_cache_and_an_earlier_turn_is_encoded_again():
    model = model_of("unified")
    options = AnswerOptions(max_new_tokens=NEW)
    session, other = Session(*model, options), Session(*model, options)
    for question, images in zip(QUESTIONS, [IMAGES[:1], IMAGES[1:2]]):
        "".join(session.ask(question, images))
    other.take_cache(session)
    expected = read_anew(model, other, QUESTIONS[0], IMAGES[:1])
    assert "".join(other.ask(QUESTIONS[0], IMAGES[:1])) == expected
    assert (other.computed_tokens, other.encoded_images) == (1, 0)

    for number, images in ((0, IMAGES[:1]), (1, IMAGES[:2])):
        request, shown = session.encode_turn(number)
        assert shown == images
        prompt = ChatPrompt(tuple(session.turns[: 2 * number + 1]))
        np.testing.assert_array_equal(request.batch.tokens, model[2]([prompt], [images]).tokens)
        ids = session.answer_ids[number]
        assert model[2].decode(ids) == session.turns[2 * number + 1].strip()
    session.undo()
    assert len(session.answer_ids) == 1


def test_a_placeholder_in_an_answer_is_not_the_place_of_an_image(monkeypatch):
    """A model may write about HTML: the next question was refused."""
    session = Session(*model_of("unified"), AnswerOptions(max_new_tokens=20))
    tokens = TOKENIZER.encode("the <image> tag")
    monkeypatch.setattr(Session, "_generate", lambda self, prompt, new_tokens: iter(tokens))
    for question, images in zip(QUESTIONS, [IMAGES[:1], []]):
        assert "".join(session.ask(question, images)) == "the <image> tag"
    assert session.turns[1::2] == ["the  tag"] * 2


def replace_turns(session: Session) -> Session:
    """The conversation before its last turn."""
    before = replace(session, turns=session.turns[:], images=session.images[:])
    before.undo()
    return before
