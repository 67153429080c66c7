"""Answers requests in batches of few shapes, in one thread that owns the model.

Requests that wait are gathered into a batch, padded to a power of two of rows and to `rows.room` of
prompt tokens and cache slots, so that few programs are compiled. A row has its own sampling options
and end. A batch ends when all its rows have; then the next requests are gathered.
"""

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlm_jax.infer import rows
from vlm_jax.infer.answer import AnswerOptions
from vlm_jax.infer.generate import SamplingParams
from vlm_jax.infer.processor import Processor
from vlm_jax.infer.stop import AnswerText
from vlm_jax.serve.limits import ApiError, Limits
from vlm_jax.structs import Batch, without_images

LEAST_TOKENS = 32  # of a prompt, rounded up by `rows.room`
LEAST_SLOTS = 64  # of a cache, rounded up by `rows.room`
# Tokens after which the next ones are computed while these are handed over. They are computed in
# vain if the answers end, which would cost short answers much.
AHEAD_TOKENS = 16
ARRIVE_SECONDS = 0.005  # between requests that arrive together
ENCODE_SECONDS = 0.25  # at most, for requests that are being encoded


@dataclass(frozen=True)
class Token:
    """A generated token, and the text that it completes."""

    text: str
    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # ids and logarithmic probabilities


@dataclass(frozen=True)
class End:
    """The end of an answer; `text` is its rest."""

    text: str
    reason: str  # "stop" or "length", as in OpenAI's API


@dataclass
class Job:
    """A request: an encoded prompt, and a function that takes its tokens and its end.

    `emit` is called in the thread of the engine.
    """

    prompt: Batch  # one row, not padded
    max_new_tokens: int
    options: AnswerOptions
    logprobs: bool
    emit: Callable[[Token | End | ApiError], None]
    deadline: float  # of time.monotonic()
    is_cancelled: bool = False
    answer: AnswerText | None = None
    is_ended: bool = False
    generated: int = field(default=0)

    @property
    def images_shape(self) -> tuple[int, ...] | None:
        return None if self.prompt.images is None else self.prompt.images.shape

    def end(self, event: End | ApiError) -> None:
        self.is_ended = True
        self.emit(event)


class _Made(NamedTuple):
    """Tokens of a few steps that are being computed."""

    choice: rows.Choice
    failed: jax.Array  # (B,), as in `DecodeState`
    steps: int


class Engine:
    """A queue of jobs and the thread that answers them.

    Attributes:
      batches: number of rows with a request -> number of batches.
    """

    def __init__(self, model: nn.Module, params, processor: Processor, limits: Limits):
        self.model, self.processor, self.limits = model, processor, limits
        self._params = params
        self._blocks = rows.decoder_blocks(model.cfg, params)
        self._queue: deque[Job] = deque()
        self._encoding = 0  # requests that will be submitted soon
        self._changed = threading.Condition()
        self._is_closing = False
        self.batches: dict[int, int] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @contextlib.contextmanager
    def expect_job(self) -> Iterator[None]:
        """Announces a job that is encoded meanwhile, so that the next batch waits for it."""
        with self._changed:
            self._encoding += 1
        try:
            yield
        finally:
            with self._changed:
                self._encoding -= 1
                self._changed.notify()

    def submit(self, job: Job) -> None:
        """Adds a job to the queue.

        Raises:
          ApiError: the queue is full, or the server stops.
        """
        with self._changed:
            if self._is_closing:
                raise ApiError("the server is stopping.", 503, code="stopping")
            if len(self._queue) >= self.limits.max_queue:
                raise ApiError(
                    f"{self.limits.max_queue} requests wait already: try again later.",
                    429,
                    code="queue_full",
                )
            self._queue.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Refuses new jobs, and answers those in the queue."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next_jobs():
            try:
                self._answer(jobs)
            # Whatever goes wrong, such as too little memory, the next batch may succeed.
            except Exception as error:
                message = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
                for job in jobs:
                    if not job.is_ended:
                        job.end(ApiError(f"the batch failed: {message}.", 500, code="failed"))

    def _next_jobs(self) -> list[Job]:
        """Waits for jobs; returns the jobs of the next batch, [] when the engine is closed."""
        with self._changed:
            while not self._queue and not self._is_closing:
                self._changed.wait()
        time.sleep(ARRIVE_SECONDS)
        with self._changed:
            self._changed.wait_for(self._has_batch, ENCODE_SECONDS)
            jobs: list[Job] = []
            others: list[Job] = []
            for job in self._queue:
                fits = not jobs or job.images_shape == jobs[0].images_shape
                is_next = fits and len(jobs) < self.limits.max_batch
                (jobs if is_next else others).append(job)
            self._queue = deque(others)
        return jobs

    def _has_batch(self) -> bool:
        return not self._encoding or len(self._queue) >= self.limits.max_batch

    def _answer(self, jobs: list[Job]) -> None:
        """Generates the answers to the prompts of a batch."""
        cfg = self.model.cfg
        for job in jobs:
            job.answer = job.options.answer_text(self.processor)
        self._end_late(jobs)
        if all(job.is_ended for job in jobs):
            return
        self.batches[len(jobs)] = self.batches.get(len(jobs), 0) + 1
        count = rows.power_of_two(len(jobs))
        padded_jobs = [*jobs, *itertools.repeat(jobs[0], count - len(jobs))]
        prompt = stack_prompts([job.prompt for job in padded_jobs], cfg.decoder.max_positions)
        length = prompt.tokens.shape[1]
        most_new = max(job.max_new_tokens for job in jobs)
        slots = rows.room(length + most_new, LEAST_SLOTS)
        sampling, keys = self._sampling(padded_jobs)
        logprobs = any(job.logprobs for job in jobs)
        image_tokens = None
        if cfg.fusion.has_images and prompt.images is not None:
            image_tokens = rows.encode_images(cfg, self._params, prompt)
        text = without_images(prompt)
        layers = rows.new_layers(cfg, self._params, count, slots)
        cache = rows.cache_of(text, layers, 0, slots)
        state, choice = rows.read(
            cfg,
            self._params,
            text,
            image_tokens,
            cache,
            length - 1,
            sampling,
            keys,
            logprobs,
        )
        # The state is donated to the next program, so its failures are copied.
        pending = [_Made(jax.tree.map(lambda x: x[None], choice), jnp.copy(state.failed), 1)]
        last = rows.select_slot(prompt, length - 1)
        count = 1
        while True:
            ahead = 1 if AHEAD_TOKENS <= count < most_new else 0
            while len(pending) > ahead:
                self._emit(jobs, pending.pop(0))
            if all(job.is_ended for job in jobs):
                return
            steps = min(rows.CHUNK_TOKENS, most_new - count)
            state, choice = rows.advance(
                cfg, self._blocks, self._params, last, state, sampling, steps, logprobs
            )
            pending.append(_Made(choice, jnp.copy(state.failed), steps))
            count += steps

    def _sampling(self, jobs: list[Job]) -> tuple[rows.RowSampling, jax.Array]:
        eos = self.processor.eos_ids
        options: list[SamplingParams] = [job.options.sampling(eos) for job in jobs]
        return rows.RowSampling.stack(options), rows.row_keys([job.options.seed for job in jobs])

    def _emit(self, jobs: list[Job], made: _Made) -> None:
        """Hands tokens to their jobs, and ends the jobs that are complete."""
        choice, failed = jax.device_get((made.choice, made.failed))
        for step, (row, job) in itertools.product(range(made.steps), enumerate(jobs)):
            if job.is_ended:
                continue
            job.generated += 1
            if failed[row] and job.generated >= failed[row]:
                job.end(ApiError("the model computes NaN for this prompt.", 500, code="nan"))
                continue
            token = int(choice.token[step, row])
            text = job.answer.feed(token)
            if token not in self.processor.eos_ids:
                job.emit(_token(text, token, job, choice, step, row))
            if job.answer.is_ended:
                job.end(End(job.answer.end(), "stop"))
            elif job.generated >= job.max_new_tokens:
                job.end(End(job.answer.end(), "length"))
        self._end_late(jobs)

    def _end_late(self, jobs: list[Job]) -> None:
        """Ends the jobs whose client has gone or whose time is over."""
        for job in jobs:
            if job.is_ended:
                continue
            if job.is_cancelled:
                job.end(ApiError("the client has gone.", 499))
            elif time.monotonic() > job.deadline:
                seconds = self.limits.time_limit_seconds
                job.end(ApiError(f"the time limit of {seconds:g} s is over.", 504, code="timeout"))


def _token(text: str, token: int, job: Job, choice: rows.Choice, step: int, row: int) -> Token:
    if not job.logprobs:
        return Token(text, token)
    top = zip(
        choice.top_ids[step, row].tolist(), choice.top_logprobs[step, row].tolist(), strict=True
    )
    return Token(text, token, float(choice.logprob[step, row]), tuple(top))


def stack_prompts(prompts: list[Batch], max_positions: int) -> Batch:
    """Stacks prompts of one row with images of one shape, padded on the left by `rows.room`."""
    longest = max(prompt.tokens.shape[1] for prompt in prompts)
    length = max(longest, min(rows.room(longest, LEAST_TOKENS), max_positions))
    stacked = [rows.pad_text(prompt, length - prompt.tokens.shape[1]) for prompt in prompts]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *stacked)
