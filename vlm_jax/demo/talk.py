"""A conversation with one model, or with several that get the same questions."""

import contextlib
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax

from vlm_jax.config import ConfigError, Experiment, NonFiniteError, UserError
from vlm_jax.data import images as image_files
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.infer.answer import AnswerOptions
from vlm_jax.infer.look.answer import WordMaps, look_at_answer
from vlm_jax.infer.look.maps import check_maps
from vlm_jax.infer.look.page import merge_heads, render_page
from vlm_jax.infer.look.pictures import image_layouts
from vlm_jax.infer.processor import Processor
from vlm_jax.infer.session import Session
from vlm_jax.nn.models import build_model
from vlm_jax.serve.images import decode_image
from vlm_jax.serve.limits import ApiError, Limits

LENGTH_MULTIPLE = 32  # of tokens of a prompt and its answer, to compile few programs for maps
SENTENCES = (UserError, NonFiniteError, ApiError, OSError, jax.errors.JaxRuntimeError)


@dataclass
class ChatModel:
    """A model of the page.

    Its KV cache goes from conversation to conversation, so that its size does not depend on the
    number of visitors.
    """

    name: str
    cfg: Experiment
    processor: Processor
    params: dict
    system: str | None = None
    _last: Session | None = None  # has the KV cache

    def new_session(self) -> Session:
        return Session(build_model(self.cfg), self.params, self.processor, system=self.system)

    def ask(self, session: Session, question: str, images: Sequence[str]) -> Generator[str]:
        """Yields the answer to a question in pieces."""
        if images and not self.cfg.fusion.has_images:
            raise ConfigError("the model is a text-only model: it takes no images.")
        # None while an answer is generated: its cache is in use.
        last, self._last = self._last, None
        if last is not None and last is not session:
            session.take_cache(last)
        try:
            yield from session.ask(question, images)
        finally:
            self._last = session

    def look(self, session: Session, number: int, methods: Sequence[str]) -> WordMaps:
        """Returns the maps of an answer; `number` is its place in the session, from 0."""
        check_maps(self.cfg.model)
        request, images = session.encode_turn(number)
        if not images:
            raise ConfigError("the question has no image: there is nothing to look at.")
        layouts = image_layouts(self.cfg.vision, images, request.processor)
        ids = session.answer_ids[number]
        maps = look_at_answer(
            request, self.params, self.name, layouts, methods, ids, LENGTH_MULTIPLE
        )
        return merge_heads(replace(maps, prompt=without_placeholders(maps.prompt)))


@dataclass
class Reply:
    """Reply of one model to a question: an answer, or the reason why there is none."""

    text: str = ""
    error: str = ""
    number: int | None = None  # of the answer in the session of the model


@dataclass
class Turn:
    """A question with its images, and the reply of each model."""

    question: str
    images: list[str]  # files
    replies: list[Reply]


@dataclass
class Talk:
    """The conversation of a visitor."""

    models: Sequence[ChatModel]
    limits: Limits = Limits()
    turns: list[Turn] = field(default_factory=list)
    _sessions: list[Session] = field(default_factory=list)
    _streams: list[Generator[str]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # of the streams

    def __post_init__(self):
        self._sessions = [model.new_session() for model in self.models]

    def ask(self, question: str, images: Sequence[str], options: AnswerOptions) -> Generator[Turn]:
        """Asks all models, and yields the turn after each piece of an answer.

        The models take turns, a piece at a time. A model that fails has an error in its reply.

        Raises:
          UserError, ApiError: the question, an image or an option is refused.
        """
        self._check(question, images, options)
        self.stop()
        turn = Turn(question, list(images), [Reply() for _ in self.models])
        self.turns.append(turn)
        try:
            for model, session, reply in zip(self.models, self._sessions, turn.replies):
                session.options = options
                self._streams.append(self._answer(model, session, turn, reply))
            yield turn
            running = list(self._streams)
            while running:
                for stream in list(running):
                    with self._lock:
                        piece = next(stream, None)
                    if piece is None:
                        running.remove(stream)
                    yield turn
        finally:
            # A visitor may ask anew before the iterator of an answer that was stopped is closed.
            if self.turns and self.turns[-1] is turn:
                self.stop()

    def stop(self) -> None:
        """Ends the answers that are being generated; what was generated stays."""
        with self._lock:
            for stream in self._streams:
                stream.close()
            self._streams.clear()

    def undo(self) -> None:
        """Removes the last question with its answers."""
        self.stop()
        if self.turns:
            for session, reply in zip(self._sessions, self.turns.pop().replies):
                if reply.number is not None:
                    session.undo()

    def render_maps(self, number: int, methods: Sequence[str]) -> tuple[str, list[str]]:
        """Returns the page with the maps of a turn's answers, and a sentence for each without.

        The page is "" if no answer has maps.
        """
        answers, sentences = [], []
        for model, session, reply in zip(self.models, self._sessions, self.turns[number].replies):
            if reply.number is None:
                continue
            try:
                answers.append(model.look(session, reply.number, methods))
            except SENTENCES as error:
                sentences.append(f"{model.name}: {describe(error)}")
        page = render_page(answers, methods[0] if methods else "mean") if answers else ""
        return page, sentences

    def _answer(
        self, model: ChatModel, session: Session, turn: Turn, reply: Reply
    ) -> Generator[str]:
        """Fills a reply piece by piece, and yields the pieces."""
        try:
            with contextlib.closing(model.ask(session, turn.question, turn.images)) as pieces:
                for piece in pieces:
                    reply.text += piece
                    reply.number = len(session.turns) // 2
                    yield piece
        except SENTENCES as error:
            reply.error, reply.number = describe(error), None

    def _check(self, question: str, images: Sequence[str], options: AnswerOptions) -> None:
        limits = self.limits
        options.check(lambda name: name.replace("_", " "))
        if not question.strip() and not images:
            raise ConfigError("write a question, or add an image.")
        if len(question) > limits.max_text_characters:
            raise ConfigError(
                f"the question has more than {limits.max_text_characters:,} characters."
            )
        earlier = sum(len(turn.images) for turn in self.turns)
        if earlier + len(images) > limits.max_images:
            raise ConfigError(
                f"the conversation has more than {limits.max_images} images: begin a new one."
            )
        for file in images:
            decode_image(image_files.read_bytes(file), Path(file).name, limits)


def without_placeholders(question: str) -> str:
    """Returns a question without the placeholders of its images."""
    return question.replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, "")


def describe(error: Exception) -> str:
    """Returns an error of SENTENCES as one sentence."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
