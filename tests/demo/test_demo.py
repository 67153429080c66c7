"""The demo answers as `chat` does, shows maps, and survives what visitors send."""

import html
import re
import socket
import threading
import urllib.request
from dataclasses import replace

import gradio_client
import numpy as np
import pytest
import uvicorn
from PIL import Image

from vlm_jax.cli.main import main
from vlm_jax.config import Data
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.demo.page import build_app
from vlm_jax.demo.talk import ChatModel, Talk
from vlm_jax.infer.answer import AnswerOptions
from vlm_jax.infer.look.answer import look_at_answer
from vlm_jax.infer.run import RunProcessor
from vlm_jax.infer.session import Session
from vlm_jax.nn.vlm import VLM
from vlm_jax.serve.limits import Limits
from vlm_jax.testing import random_params, tiny

OPTIONS = AnswerOptions(max_new_tokens=6)
TOKENIZER = Tokenizer.train(["USER: ASSISTANT: what is it? and now?"], 290)
SAMPLING = (0.0, 1.0, 0, 0, 6)  # the values of the page's options


def make_model(kind: str) -> ChatModel:
    cfg = tiny(kind, data=Data(source="conversations", template="vicuna", augment=()))
    decoder = replace(cfg.decoder, tie_word_embeddings=False, max_positions=400)
    cfg = replace(cfg, decoder=decoder)
    return ChatModel(kind, cfg, RunProcessor(cfg, TOKENIZER), random_params(cfg, 0.3))


MODELS = [make_model("unified"), make_model("text_only")]


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("images") / "a picture.gif"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file)
    return str(file)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Address of a page for both models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        limits = Limits(max_image_px=10_000, max_image_bytes=50_000)
        app = build_app(MODELS, OPTIONS, limits)
        # A page keeps a connection open.
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            server.should_exit = True
            thread.join()


def expected(model: ChatModel, turns: tuple[str, ...], images=()) -> str:
    """The answer of a new conversation with the same turns."""
    arguments = VLM(model.cfg.model), model.params, model.processor, OPTIONS
    *earlier, question = turns
    count = question.count("<image>")
    shown = list(images)
    before = shown[: len(shown) - count]
    session = Session(*arguments, turns=earlier, images=before)
    return "".join(session.ask(question, shown[len(before) :]))


def test_both_models_answer_as_in_a_chat_and_a_failure_is_in_its_own_reply(picture):
    talk = Talk(MODELS)
    *_, turn = talk.ask("what is it?", [picture], OPTIONS)
    first = expected(MODELS[0], ("<image>\nwhat is it?",), [picture])
    assert turn.replies[0].text == first
    assert "takes no images" in turn.replies[1].error and turn.replies[1].number is None

    *_, turn = talk.ask("and now?", [], OPTIONS)
    turns = ("<image>\nwhat is it?", first, "and now?")
    assert turn.replies[0].text == expected(MODELS[0], turns, [picture])
    # The text-only model has not seen the first question.
    assert turn.replies[1].text == expected(MODELS[1], ("and now?",))
    assert [reply.number for reply in turn.replies] == [1, 0]

    # An image of an earlier turn has maps too.
    for number in (0, 1):
        page, sentences = talk.render_maps(number, ["rollout"])
        words = turn.replies[0].text.split() if number else first.split()
        shown = re.findall(r'aria-pressed="false">(.*?)</button>', page, re.S)
        assert [html.unescape(word).strip() for word in shown] == words
    assert len(sentences) == 1 and "fusion.kind text_only reads no image" in sentences[0]

    # The maps are read with padding after the answer.
    session = talk._sessions[0]
    padded = MODELS[0].look(session, 0, ["rollout"])
    request, _ = session.encode_turn(0)
    exact = look_at_answer(request, MODELS[0].params, "", [(1, 1)], ids=session.answer_ids[0])
    np.testing.assert_allclose(padded.weights[0], exact.weights[0], atol=1e-6)
    assert padded.prompt == "what is it?"

    talk.undo()
    *_, turn = talk.ask("and now?", [], OPTIONS)
    assert turn.replies[0].text == expected(MODELS[0], turns, [picture])


def test_another_visitor_and_an_answer_that_is_stopped_change_nothing(picture):
    talk, other = Talk(MODELS[:1]), Talk(MODELS[:1])
    pieces = talk.ask("what is it?", [picture], OPTIONS)
    while not next(pieces).replies[0].text:
        pass
    *_, turn = other.ask("and now?", [], OPTIONS)
    assert turn.replies[0].text == expected(MODELS[0], ("and now?",))
    talk.stop()
    begun = talk.turns[0].replies[0].text
    assert list(pieces)[-1].replies[0].text == begun
    assert expected(MODELS[0], ("<image>\nwhat is it?",), [picture]).startswith(begun)
    *_, turn = talk.ask("and now?", [], OPTIONS)
    turns = ("<image>\nwhat is it?", begun, "and now?")
    assert turn.replies[0].text == expected(MODELS[0], turns, [picture])


def test_the_page_asks_nothing_of_other_hosts(url):
    with urllib.request.urlopen(url) as response:
        policy, text = response.headers["content-security-policy"], response.read().decode()
    assert "default-src 'self'" in policy and "//" not in policy
    loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"'](?:https?:)?//[^\"']*", text)
    assert not loaded


def test_a_visitor_gets_an_answer_or_a_sentence(url, picture, tmp_path, capfd):
    client = gradio_client.Client(url, verbose=False)

    def ask(text, files=(), sampling=SAMPLING):
        message = {"text": text, "files": [gradio_client.handle_file(file) for file in files]}
        *chats, status, _, _, _ = client.predict(message, *sampling, api_name="/ask")
        return chats, re.sub("<.*?>", "", html.unescape(status))

    bomb = tmp_path / "bomb.png"
    Image.new("1", (10_000, 10_000)).save(bomb)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    refused = {
        "write a question": ("", []),
        "more than 1,000,000 characters": ("a" * 10_000_000, []),
        "10000 x 10000 px, more than 10000 pixels": ("what?", [bomb]),
        "broken.png is not a readable image": ("what?", [broken]),
        "temperature -1: it must be at least 0": ("what?", [], (-1, 1.0, 0, 0, 6)),
        "seed None: it must be a whole number": ("what?", [], (0, 1.0, 0, None, 6)),
        "max new tokens 0: it must be at least 1": ("what?", [], (0, 1.0, 0, 0, 0)),
    }
    for sentence, arguments in refused.items():
        chats, status = ask(*arguments)
        assert sentence in status and chats == [[], []]
    large = tmp_path / "large.png"
    large.write_bytes(bytes(60_000))
    with pytest.raises(Exception, match="413|exceeds"):
        ask("what?", [large])

    chats, status = ask("what is it?", [picture])
    answers = [chat[-1]["content"][0]["text"] for chat in chats]
    assert answers[0] == expected(MODELS[0], ("<image>\nwhat is it?",), [picture]).strip()
    assert "takes no images" in answers[1] and status == ""
    page = client.predict(0, ["rollout"], True, api_name="/look")
    assert client.predict(api_name="/reset")[0] == []
    # Browsers do not show TIFF.
    tiff = tmp_path / "scan.tif"
    Image.open(picture).save(tiff)
    chats, _ = ask("what is it?", [tiff])
    with Image.open(chats[0][0]["content"][0]["file"]) as image:
        assert image.format == "PNG" and image.size == (24, 20)
    assert 'srcdoc="&lt;!doctype html&gt;' in page and "rollout through the layers" in page
    assert client.predict(api_name="/undo")[0] == []
    assert "Traceback" not in capfd.readouterr().err


def test_a_model_against_itself_is_refused(tmp_path, capsys):
    assert main(["demo", "--checkpoint", str(tmp_path), "--against", f"{tmp_path}/."]) == 2
    assert "is the first model" in capsys.readouterr().err
    assert main(["demo", "--checkpoint", "a", "--port", "70000"]) == 2
    assert "--port 70000: it must be from 0 to 65535" in capsys.readouterr().err
