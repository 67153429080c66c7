"""`chat` answers lines of stdin, and its commands change or save the conversation."""

import io
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import vlm_jax
from vlm_jax.cli import chat as chat_command
from vlm_jax.cli.chat import COMMANDS, Chat, print_pieces
from vlm_jax.cli.main import main
from vlm_jax.config import Data, UserError
from vlm_jax.data import conversations
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.hub.text.prompts import ChatPrompt
from vlm_jax.infer.answer import AnswerOptions
from vlm_jax.infer.run import RunProcessor
from vlm_jax.infer.session import Session
from vlm_jax.nn.vlm import VLM
from vlm_jax.testing import random_params, tiny

NEW = 6
TOKENIZER = Tokenizer.train(["USER: ASSISTANT: what is it? and now?"], 290)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("images") / "a picture.gif"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file)
    return str(file)


def make_session(template="vicuna", source="conversations") -> Session:
    cfg = tiny(data=Data(source=source, template=template, augment=()))
    cfg = replace(cfg, decoder=replace(cfg.decoder, tie_word_embeddings=False, max_positions=400))
    model = VLM(cfg.model), random_params(cfg, 0.3), RunProcessor(cfg, TOKENIZER)
    return Session(*model, AnswerOptions(max_new_tokens=NEW))


def respond(chat: Chat, line: str) -> str:
    return "".join(chat.respond(line))


def test_commands_lead_a_conversation_that_training_reads(picture, tmp_path):
    session = make_session()
    chat = Chat(session)
    assert respond(chat, f"/image '{picture}'") == "(1 for the next question)"
    first = respond(chat, "what is it?")
    second = respond(chat, "and now?")
    assert session.turns == ["<image>\nwhat is it?", first, "and now?", second]
    assert respond(chat, "/undo") == "(removed)"
    respond(chat, "/system be brief")
    respond(chat, f"/image '{picture}'")
    third = respond(chat, "and now?")

    file = tmp_path / "talk.json"
    respond(chat, f"/save {file}")
    data = Data(source="conversations", files=(str(file),), dir=str(tmp_path / "datasets"))
    (saved,) = conversations.load(data, "train")
    # Files are read without the spaces around an answer.
    turns = ("<image>\nwhat is it?", first, "<image>\nand now?", third)
    assert [turn.strip() for turn in saved.turns] == [turn.strip() for turn in turns]
    assert saved.system == "be brief" and len(saved.images) == 2

    respond(chat, "/reset")
    assert (session.turns, session.images, session.system) == ([], [], "be brief")
    assert set(COMMANDS) == {line.split()[0][1:] for line in respond(chat, "/help").splitlines()}


def test_a_run_of_single_questions_is_asked_about_the_last_image(picture):
    session = make_session(source="easy_vqa")
    model = session.model, session.params, session.processor
    chat = Chat(session)
    respond(chat, f"/image '{picture}'")
    for question in ("what is it?", "and now?"):
        (expected,) = vlm_jax.generate(*model, [question], [[picture]], max_new_tokens=NEW)
        assert respond(chat, question) == expected
    assert session.encoded_images == 0
    with pytest.raises(UserError, match="has no system turn"):
        respond(chat, "/system be brief")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/imge a.png", "/imge is not a command.*image"),
        ("/image", "/image needs a FILE"),
        ("/image nothing.png", "cannot read the image nothing.png"),
        ("/image 'a", "No closing quotation"),
        ("/save talk", "must end in .json"),
        ("/save talk.json", "there is no turn to save"),
        ("what is <image>?", "1 <image> placeholders for 0 images"),
        ("long " * 1000, "is too long"),
        ("\udcff", "not text in UTF-8"),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(line, message):
    session = make_session()
    with pytest.raises(UserError, match=message):
        respond(Chat(session), line)
    assert session.turns == []


def test_the_images_of_a_refused_question_are_those_of_the_next(picture):
    """They were forgotten, and the next question was answered without them."""
    chat = Chat(make_session())
    respond(chat, f"/image '{picture}'")
    with pytest.raises(UserError, match="2 <image> placeholders for 1 images"):
        respond(chat, "<image> or <image>?")
    assert respond(chat, "/undo") == "(removed the images of the next question)"


def test_an_answer_that_ctrl_c_stops_stays_in_the_conversation(picture, monkeypatch):
    """Ctrl-C nearly always comes while the next token is computed."""

    def generate(session, prompt, new_tokens):
        yield from TOKENIZER.encode("it is")
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_generate", generate)
    session = make_session()
    with pytest.raises(KeyboardInterrupt):
        "".join(session.ask("what is it?", [picture]))
    assert (session.turns, session.images) == (["<image>\nwhat is it?", "it is"], [picture])


def test_a_stopped_answer_stays_in_the_conversation():
    session = make_session()
    expected = "".join(make_session().ask("what is it?"))
    pieces = session.ask("what is it?")
    first = next(pieces)
    pieces.close()
    assert session.turns == ["what is it?", first] and expected.startswith(first)
    prompt = ChatPrompt((*session.turns, "and now?"))
    model = session.model, session.params, session.processor
    assert ["".join(session.ask("and now?"))] == vlm_jax.generate(
        *model, [prompt], max_new_tokens=NEW
    )


def test_lines_of_a_pipe_are_answered_and_an_error_does_not_end_it(monkeypatch, capsys):
    session = make_session()
    answer = "".join(session.ask("what is it?"))
    session.reset()
    monkeypatch.setattr(chat_command, "parse_model", lambda *args: parsed())
    monkeypatch.setattr(chat_command, "answer_options", lambda *args: session.options)
    monkeypatch.setattr(chat_command, "open_model", lambda *args: Opened(session))
    monkeypatch.setattr("vlm_jax.nn.models.build_model", lambda cfg: session.model)
    lines = b"/wrong\n\nwhat is it?\n\xff\n/reset\nwhat is it?"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert main(["chat"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("error: /wrong is not a command")
    assert printed.endswith(f"(new conversation)\n{answer.rstrip(chr(10))}\n")
    assert printed.count(answer) == 2 and printed.count("error: ") == 2


def parsed():
    import argparse

    return argparse.Namespace(system=None), None


class Opened:
    """A `TextModel` that is loaded already."""

    def __init__(self, session: Session):
        self.cfg = None
        self.load_processor = lambda: session.processor
        self.load_params = lambda: session.params


def test_pieces_end_with_one_line_end(capsys):
    print_pieces(["a", "", "b\n", ""])
    print_pieces(["a", "b"])
    print_pieces([])
    assert capsys.readouterr().out == "ab\nab\n"
