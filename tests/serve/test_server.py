"""The server answers as `generate` does, and a bad request is one sentence in OpenAI's form."""

import base64
import concurrent.futures
import contextlib
import io
import json
import re
import socket
import threading
import time
import urllib.request
from dataclasses import replace

import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

import vlm_jax
from tests.limits import LIMIT_SECONDS
from vlm_jax.config import Data
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.hub.text.prompts import ChatPrompt
from vlm_jax.infer import rows
from vlm_jax.infer.answer import AnswerOptions, encode
from vlm_jax.infer.run import RunProcessor
from vlm_jax.nn.vlm import VLM
from vlm_jax.serve.app import Settings, build_app
from vlm_jax.serve.engine import End, Engine, Job
from vlm_jax.serve.images import image_reader
from vlm_jax.serve.limits import Limits
from vlm_jax.serve.protocol import parse_request
from vlm_jax.testing import random_params, tiny

NEW = 6
QUESTIONS = ("what shape is it?", "and the color?", "is it red?", "yes or no?")
TOKENIZER = Tokenizer.train([*QUESTIONS, "USER: ASSISTANT: yes no"], 290)
PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3)).astype(np.uint8))
    for i in range(2)
]


def make_model():
    cfg = tiny(data=Data(source="conversations", template="vicuna", augment=()))
    decoder = replace(cfg.decoder, tie_word_embeddings=False, max_positions=400)
    cfg = replace(cfg, decoder=decoder)
    return VLM(cfg.model), random_params(cfg, 0.3), RunProcessor(cfg, TOKENIZER)


MODEL = make_model()
ADVANCE = rows.advance


@contextlib.contextmanager
def running(**limits):
    """A server on a free port; yields its URL and its engine."""
    engine = Engine(*MODEL, Limits(**limits))
    settings = Settings("tiny", AnswerOptions(max_new_tokens=NEW), api_key="secret")
    config = uvicorn.Config(build_app(engine, settings), log_level="error")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join()
    assert not engine.is_alive


@pytest.fixture(scope="module")
def server():
    # Every number of rows in a batch is a program: 1, 2 and 4.
    with running(max_image_px=10_000, max_queue=100, max_batch=4) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="secret", max_retries=0)


def data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def messages_of(question: str, pictures=(), history=()) -> list[dict]:
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(history)
    ]
    parts = [{"type": "image_url", "image_url": {"url": data_url(each)}} for each in pictures]
    return [*messages, {"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def alone(question: str, pictures=(), history=(), **options) -> str:
    turn = "".join("<image>\n" for _ in pictures) + question
    prompt = ChatPrompt((*history, turn))
    options = {"max_new_tokens": NEW} | options
    return vlm_jax.generate(*MODEL, [prompt], [list(pictures)], **options)[0]


def ask(client, question: str, pictures=(), history=(), **options):
    messages = messages_of(question, pictures, history)
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def test_long_answers_are_computed_ahead(monkeypatch):
    """The last tokens are computed while earlier ones are handed over, and are the same."""
    options = AnswerOptions(max_new_tokens=24)
    request = encode(MODEL[0], MODEL[2], [ChatPrompt(("yes or no?",))], [[]], options)
    batch = rows.with_own_images(request.batch)
    engine = Engine(*MODEL, Limits())
    emitted_before = []

    def answer() -> list:
        events, is_ended = [], threading.Event()

        def emit(event):
            events.append(event)
            if isinstance(event, End):
                is_ended.set()

        def advance(*arguments):
            emitted_before.append(len(events))
            return ADVANCE(*arguments)

        emitted_before.clear()
        monkeypatch.setattr(rows, "advance", advance)
        engine.submit(Job(batch, 24, options, False, emit, time.monotonic() + LIMIT_SECONDS))
        assert is_ended.wait(LIMIT_SECONDS)
        return events

    ahead = answer()
    assert emitted_before == [1, 5, 9, 13, 13, 17]
    monkeypatch.setattr("vlm_jax.serve.engine.AHEAD_TOKENS", 1000)
    assert answer() == ahead
    assert emitted_before == [1, 5, 9, 13, 17, 21]
    engine.close()


def test_rooms_are_few_and_not_much_larger_than_asked():
    rooms = [rows.room(count, 32) for count in range(1, 1025)]
    assert all(count <= room <= 1.5 * count for count, room in enumerate(rooms, 1) if count > 32)
    assert set(rooms) == {32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024}


def test_fifty_requests_at_once_are_answered_as_each_alone(server, client):
    sampled = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    cases = []
    for number in range(50):
        pictures = PICTURES[: number % 2]
        history = ("is it red?", "no") if number % 3 == 0 else ()
        # About pictures: `alone` compiles a program for every kind of prompt and option.
        options = sampled if number % 10 == 5 else {}
        cases.append((QUESTIONS[number % 4], pictures, history, options))
    expected = {}
    for question, pictures, history, options in cases:
        key = question, len(pictures), history, bool(options)
        if key not in expected:
            expected[key] = alone(question, pictures, history, **options)
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda case: ask(client, *case[:3], **case[3]), cases))
    for (question, pictures, history, options), answer in zip(cases, answers):
        text = answer.choices[0].message.content
        assert text == expected[question, len(pictures), history, bool(options)]
    assert len(set(expected.values())) > 5
    assert max(server[1].batches) > 1, "no two requests were answered together"


def test_a_stream_is_the_answer_in_pieces_with_usage(client):
    expected = alone(QUESTIONS[0], PICTURES[:1])
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = list(ask(client, QUESTIONS[0], PICTURES[:1], **options))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == expected
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    whole = ask(client, QUESTIONS[0], PICTURES[:1])
    assert last.usage == whole.usage
    batch = MODEL[2](f"<image>\n{QUESTIONS[0]}", [PICTURES[:1]])
    assert whole.usage.prompt_tokens == batch.tokens.shape[1]
    assert 1 <= whole.usage.completion_tokens <= NEW


def test_stop_strings_lengths_and_logprobs(client):
    question = max(QUESTIONS, key=lambda question: len(alone(question)))
    answer = alone(question)
    stop = answer[1:3]
    cut = ask(client, question, stop=stop, logprobs=True, top_logprobs=2)
    choice = cut.choices[0]
    assert (choice.message.content, choice.finish_reason) == (answer.partition(stop)[0], "stop")
    entry = choice.logprobs.content[0]
    assert len(entry.top_logprobs) == 2
    # A greedy token is the most likely one.
    assert entry.logprob == entry.top_logprobs[0].logprob <= 0
    short = ask(client, question, max_tokens=1).choices[0]
    assert short.finish_reason == "length" and answer.startswith(short.message.content)


def post(url: str, body: bytes, key: str = "secret") -> tuple[int, dict]:
    request = urllib.request.Request(f"{url}/v1/chat/completions", body)
    request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def with_fields(**fields) -> bytes:
    return json.dumps({"model": "tiny", "messages": messages_of("what?")} | fields).encode()


def with_url(url) -> bytes:
    part = {"type": "image_url", "image_url": {"url": url}}
    return with_fields(messages=[{"role": "user", "content": [part]}])


BOMB = Image.new("1", (10_000, 10_000))
MALFORMED = {
    b"": "the body is not JSON",
    b"\xff\xfe": "the body is not JSON",
    b"[" * 100_000: "the body is not JSON",
    b"[]": "must be a JSON object",
    b"{}": "messages is missing",
    with_fields(messages=[]): "the last message must have the role user",
    with_fields(messages=[1]): r"messages\[0\] must be an object",
    with_fields(messages=[{"role": "user"}]): "content must be text or a list",
    with_fields(messages=[{"role": "tool", "content": "a"}]): 'has the role "tool", not user',
    with_fields(messages=[{"role": "user", "content": "<image>"}]): "has <image> in its text",
    with_fields(
        messages=[
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "tool_calls": [{"id": "1"}]},
            {"role": "user", "content": "c"},
        ]
    ): r"messages\[1\] has tool_calls, which is not supported",
    with_fields(messages=[{"role": "user", "content": "\ud800"}]): "not text in UTF-8",
    with_fields(messages=[{"role": "user", "content": "a" * 10_000_000}]): "1000000 characters",
    with_fields(messages=[{"role": "user", "content": "a b " * 1000}]): "is too long",
    with_fields(temperature=-1): "temperature -1: it must be at least 0",
    with_fields(temperature="hot"): "temperature 'hot': it must be a number",
    with_fields(temperature=float("nan")): "finite",
    with_fields(top_p=0): "top_p 0: it must be above 0",
    with_fields(top_k=10**30): "top_k is 10+: it must be a whole number",
    with_fields(seed=-3): "seed -3",
    with_fields(max_tokens=0): "max_tokens is 0: it must be a whole number from 1",
    with_fields(stop=[""]): "empty text",
    with_fields(stop=3): "stop must be text or a list",
    with_fields(n=2): "n 2 is not supported",
    with_fields(tools=[{}]): "is not supported",
    with_fields(color="red"): "unknown field color",
    with_fields(top_logprobs=3): "top_logprobs needs logprobs",
    with_fields(stream="yes"): "stream is .yes.: it must be a Boolean",
    with_url("http://localhost/a.png"): "takes images as data URLs",
    with_url("file:///etc/passwd"): "takes images as data URLs",
    with_url(None): "url is missing",
    with_url("data:image/png;base64,!!!"): "is not base64",
    with_url("data:image/png;base64,AAAA"): "is not a readable image",
    with_url(data_url(BOMB)): "10000 x 10000 px, more than 10000 pixels",
}


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_request_is_an_error_of_the_client(server, body):
    status, answer = post(server[0], body)
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert re.search(MALFORMED[body], answer["error"]["message"]), answer


def test_an_answer_with_the_placeholder_of_an_image_is_taken_back():
    """A client sends the answers of the server again, with its next question."""
    turns = ["what?", "the <image> tag", "why?"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": x} for i, x in enumerate(turns)]
    fields = {"model": "tiny", "messages": messages}
    parsed = parse_request(fields, AnswerOptions(), Limits(), image_reader(Limits()))
    assert parsed.prompt.turns == ("what?", "the  tag", "why?")


def test_other_errors_have_the_types_of_the_client(server, client):
    with pytest.raises(openai.NotFoundError, match="does not exist: choose tiny"):
        client.chat.completions.create(model="gpt", messages=messages_of("what?"))
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="wrong"), "what?")
    with pytest.raises(openai.BadRequestError, match="top_p"):
        ask(client, "what?", top_p=3)
    assert post(f"{server[0]}/v2", b"{}")[0] == 404
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "vlm_jax"


def test_health_and_metrics(server, client):
    ask(client, "what?")
    with urllib.request.urlopen(f"{server[0]}/health") as response:
        assert json.loads(response.read()) == {"status": "ok"}
    with urllib.request.urlopen(f"{server[0]}/metrics") as response:
        text = response.read().decode()
    assert 'vlm_jax_requests_total{status="200"}' in text
    assert "vlm_jax_waiting_requests 0.0" in text


def test_a_gif_is_an_image(client):
    file = io.BytesIO()
    PICTURES[0].save(file, "gif", save_all=True, append_images=PICTURES[1:])
    url = "data:image/gif;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}]
    )
    assert answer.choices[0].message.content


def test_a_full_queue_and_a_time_limit_and_a_client_that_leaves():
    with running(max_queue=1, time_limit_seconds=0.1, max_batch=1) as (url, engine):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        answer_batch, release, jobs = engine._answer, threading.Event(), []

        def slow(batch):
            jobs.extend(batch)
            release.wait()
            answer_batch(batch)

        engine._answer = slow
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            first = pool.submit(ask, client, "what?")
            wait_until(lambda: jobs)
            second = pool.submit(ask, client, "what?")
            wait_until(lambda: engine.waiting == 1)
            with pytest.raises(openai.RateLimitError, match="too many requests"):
                ask(client, "what?")
            time.sleep(0.1)
            release.set()
            for late in (first, second):
                with pytest.raises(openai.InternalServerError, match="time limit of 0.1 s"):
                    late.result()
        release.clear()
        jobs.clear()
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.3), "what?")
        wait_until(lambda: jobs and jobs[0].is_cancelled)
        release.set()
        wait_until(lambda: jobs[0].is_ended)
        assert jobs[0].generated == 0


def wait_until(condition) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
