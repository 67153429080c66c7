"""The HTTP server: `/v1/chat/completions` and `/v1/models` of OpenAI's API, `/health`, `/metrics`.

It serves evaluation harnesses and colleagues. It is not a serving engine: a request joins no batch
that has begun.
"""

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from vlm_jax.config import UserError
from vlm_jax.infer.answer import AnswerOptions, encode
from vlm_jax.infer.rows import with_own_images
from vlm_jax.serve.engine import End, Engine, Job, Token
from vlm_jax.serve.images import image_reader
from vlm_jax.serve.limits import ApiError
from vlm_jax.serve.metrics import CONTENT_TYPE_LATEST, Metrics
from vlm_jax.serve.protocol import ChatRequest, parse_body, parse_request

POLL_SECONDS = 0.2  # between looks whether a client has gone


@dataclass(frozen=True)
class Settings:
    """Settings of a server."""

    model_name: str
    options: AnswerOptions  # for fields that a request leaves out
    api_key: str = ""  # "": none is needed
    allows_http: bool = False  # images of http URLs


@dataclass
class Answer:
    """A request that is being answered: its events, and what they add up to."""

    request: ChatRequest
    job: Job
    events: asyncio.Queue
    start: float
    name: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    tokens: int = 0

    @property
    def usage(self) -> dict:
        prompt = int((self.job.prompt.segment_ids > 0).sum())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.tokens,
            "total_tokens": prompt + self.tokens,
        }


def build_app(engine: Engine, settings: Settings) -> FastAPI:
    """Returns the application; it closes the engine when it stops."""
    server = Server(engine, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/metrics", server.metrics_text, methods=["GET"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", server.one_model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", server.complete, methods=["POST"])
    app.add_exception_handler(ApiError, server.refuse)
    app.add_exception_handler(UserError, server.refuse)
    app.add_exception_handler(HTTPException, server.refuse)
    app.add_exception_handler(Exception, server.refuse)
    return app


class Server:
    """The handlers of an application."""

    def __init__(self, engine: Engine, settings: Settings):
        self._engine = engine
        self._settings = settings
        self._metrics = Metrics(engine)
        self._created = int(time.time())
        self._read_image = image_reader(engine.limits, settings.allows_http)
        # Chat templates and tokenizers keep state while they run.
        self._encoding = asyncio.Lock()
        self._pending = 0  # requests before their answer begins

    async def health(self) -> Response:
        is_alive = self._engine.is_alive
        return _json({"status": "ok" if is_alive else "stopped"}, 200 if is_alive else 503)

    async def metrics_text(self) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return _json({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request, name: str) -> Response:
        self._check_key(request)
        self._check_model(name)
        return _json(self._model())

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Answers a failed request in OpenAI's form."""
        match error:
            case ApiError():
                answer = error
            case UserError():
                answer = ApiError(str(error))
            case HTTPException():
                answer = ApiError(f"{request.url.path}: {error.detail}.", error.status_code)
            case _:
                answer = ApiError(f"{type(error).__name__} in the server.", 500)
        self._metrics.requests.labels(str(answer.status)).inc()
        return _json(answer.body(), answer.status)

    async def complete(self, request: Request) -> Response:
        """Answers `/v1/chat/completions`."""
        self._check_key(request)
        answer = await self._begin(request)
        if answer.request.stream:
            return StreamingResponse(self._stream(answer), media_type="text/event-stream")
        return await self._whole(request, answer)

    async def _begin(self, request: Request) -> Answer:
        """Checks and encodes a request, and adds it to the queue."""
        limits = self._engine.limits
        if self._pending + self._engine.waiting >= limits.max_queue:
            raise ApiError("too many requests wait: try again later.", 429, code="queue_full")
        self._pending += 1
        try:
            start = time.monotonic()
            fields = parse_body(await self._read_body(request))
            with self._engine.expect_job():
                return await self._submit(fields, start)
        finally:
            self._pending -= 1

    async def _submit(self, fields, start: float) -> Answer:
        async with self._encoding:
            parsed, prompt, length = await asyncio.to_thread(self._encode, fields)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def emit(event) -> None:
            # The loop is closed if the server was stopped by force.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        deadline = start + self._engine.limits.time_limit_seconds
        job = Job(prompt, length, parsed.options, parsed.logprobs, emit, deadline)
        self._engine.submit(job)
        return Answer(parsed, job, events, start)

    async def _read_body(self, request: Request) -> bytes:
        limit, body = self._engine.limits.max_body_bytes, bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise ApiError(f"the body has more than {limit} bytes.", 413)
        return bytes(body)

    def _encode(self, fields):
        """Returns the checked request, its prompt as a batch of one row, and the most tokens."""
        engine, settings = self._engine, self._settings
        parsed = parse_request(fields, settings.options, engine.limits, self._read_image)
        self._check_model(parsed.model)
        encoded = encode(
            engine.model, engine.processor, [parsed.prompt], [parsed.images], parsed.options
        )
        return parsed, with_own_images(encoded.batch), int(encoded.max_lengths[0])

    async def _events(self, answer: Answer) -> AsyncIterator[Token | End]:
        """Yields the events of an answer up to its end; a caller that leaves cancels the job."""
        try:
            while True:
                event = await answer.events.get()
                if isinstance(event, ApiError):
                    raise event
                answer.tokens += isinstance(event, Token)
                yield event
                if isinstance(event, End):
                    self._count(answer)
                    return
        finally:
            answer.job.is_cancelled = True

    async def _whole(self, request: Request, answer: Answer) -> Response:
        """Returns the answer in one piece, unless the client goes away."""
        reading = asyncio.ensure_future(self._collect(answer))
        try:
            while not (await asyncio.wait([reading], timeout=POLL_SECONDS))[0]:
                if await request.is_disconnected():
                    raise ApiError("the client has gone.", 499)
        finally:
            if not reading.done():
                reading.cancel()
                answer.job.is_cancelled = True
        text, reason, logprobs = reading.result()
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": logprobs}
        body = self._envelope(answer, "chat.completion", [choice]) | {"usage": answer.usage}
        return _json(body)

    async def _collect(self, answer: Answer) -> tuple[str, str, dict | None]:
        """Returns the text, the reason of its end and the logarithmic probabilities."""
        pieces, tokens, reason = [], [], ""
        async for event in self._events(answer):
            pieces.append(event.text)
            if isinstance(event, Token):
                tokens.append(event)
            else:
                reason = event.reason
        return "".join(pieces), reason, self._logprobs(answer, tokens)

    async def _stream(self, answer: Answer) -> AsyncIterator[str]:
        """Yields server-sent events, as OpenAI's API does."""
        kind, tokens = "chat.completion.chunk", []

        def chunk(delta: dict, reason: str | None = None) -> str:
            logprobs = self._logprobs(answer, tokens)
            tokens.clear()
            choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
            return _event(self._envelope(answer, kind, [choice]))

        yield chunk({"role": "assistant", "content": ""})
        try:
            async for event in self._events(answer):
                if isinstance(event, Token):
                    tokens.append(event)
                if event.text or answer.request.logprobs:
                    yield chunk({"content": event.text})
                if isinstance(event, End):
                    yield chunk({}, event.reason)
        except ApiError as error:
            self._metrics.requests.labels(str(error.status)).inc()
            yield _event(error.body())
            return
        if answer.request.include_usage:
            yield _event(self._envelope(answer, kind, []) | {"usage": answer.usage})
        yield "data: [DONE]\n\n"

    def _logprobs(self, answer: Answer, tokens: list[Token]) -> dict | None:
        if not answer.request.logprobs:
            return None
        content = []
        for token in tokens:
            top = token.top[: answer.request.top_logprobs]
            entry = self._entry(token.id, token.logprob)
            content.append(entry | {"top_logprobs": [self._entry(*pair) for pair in top]})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict:
        text = self._engine.processor.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _envelope(self, answer: Answer, kind: str, choices: list[dict]) -> dict:
        return {
            "id": answer.name,
            "object": kind,
            "created": answer.created,
            "model": self._settings.model_name,
            "choices": choices,
        }

    def _count(self, answer: Answer) -> None:
        usage = answer.usage
        self._metrics.requests.labels("200").inc()
        self._metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self._metrics.generated_tokens.inc(usage["completion_tokens"])
        self._metrics.seconds.observe(time.monotonic() - answer.start)

    def _model(self) -> dict:
        name = self._settings.model_name
        return {"id": name, "object": "model", "created": self._created, "owned_by": "vlm_jax"}

    def _check_model(self, name: str) -> None:
        if name != self._settings.model_name:
            raise ApiError(
                f"the model {name[:100]!r} does not exist: choose {self._settings.model_name}.",
                404,
                "model",
                "model_not_found",
            )

    def _check_key(self, request: Request) -> None:
        key = self._settings.api_key
        header = request.headers.get("authorization", "")
        if key and not hmac.compare_digest(header.encode(), f"Bearer {key}".encode()):
            raise ApiError("the API key is missing or wrong.", 401, code="invalid_api_key")


def _json(body: dict, status: int = 200) -> Response:
    # ASCII, because a text may have half a surrogate pair.
    return Response(json.dumps(body), status, media_type="application/json")


def _event(body: dict) -> str:
    return f"data: {json.dumps(body)}\n\n"
