"""Answers to prompts about images, by a training run or a public checkpoint alike."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import linen as nn

from vlm_jax.config import ConfigError, Model
from vlm_jax.config.bounds import check_sampling
from vlm_jax.hub.images.steps import ImageInputs
from vlm_jax.hub.text.prompts import ChatPrompt, Prompts
from vlm_jax.infer.generate import NonFiniteLogits, SamplingParams, generate, stream
from vlm_jax.infer.processor import Processor
from vlm_jax.infer.stop import AnswerText, check_stop
from vlm_jax.nn.vlm import VLM
from vlm_jax.structs import Batch, image_arrays

SHOWN_CHARACTERS = 40  # of a prompt, in a message
# Logits that are divided by a lower one overflow float32.
LEAST_TEMPERATURE = 1e-6
# Prompts are padded to a multiple of it, so that prompts of like lengths share a compiled program.
LENGTH_MULTIPLE = 64


@dataclass(frozen=True)
class AnswerOptions:
    """Settings of the answers to a batch of prompts; `vlm_jax.generate` documents each."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = True
    stop: tuple[str, ...] = ()

    def check(self, spell: Callable[[str], str] = str) -> None:
        """Raises ConfigError for an option that is out of range; `spell` is applied to its name."""
        check_sampling(
            self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed, spell
        )
        check_stop(self.stop, spell("stop"))

    def sampling(self, eos: tuple[int, ...]) -> SamplingParams:
        """Returns the options of the token loop; `eos` are the ids that end an answer."""
        temperature = max(self.temperature, LEAST_TEMPERATURE) if self.temperature else 0.0
        return SamplingParams(eos, temperature, self.top_k, self.top_p)

    def answer_text(self, processor: Processor) -> AnswerText:
        """Returns the empty text of an answer, which takes its tokens."""
        return AnswerText(processor.decode_stream(), processor.eos_ids, self.stop)


@dataclass(frozen=True)
class Request:
    """Encoded prompts, checked before the parameters of the model are loaded."""

    model: VLM
    processor: Processor
    prompts: Sequence[str | ChatPrompt]
    batch: Batch
    max_lengths: np.ndarray  # (B,) most tokens of each answer
    options: AnswerOptions

    def answers(self, params) -> list[str]:
        """Generates the answer to each prompt, up to the first stop string.

        Raises:
          NonFiniteLogits: the model computes NaN for a prompt.
        """
        if not self.options.stop:
            return [self.processor.decode(ids) for ids in self.answer_ids(params)]
        return self._by_length(functools.partial(self._texts_to_stop, params))

    def answer_ids(self, params) -> list[np.ndarray]:
        """Generates the tokens of the answer to each prompt, with its end token and padding.

        Stop strings are not applied. Raises the errors of `answers`.
        """
        return self._by_length(functools.partial(self._ids, params))

    def _by_length(self, generate_rows: Callable[[Batch, int], Sequence]) -> list:
        """Returns the answers of `generate_rows` in the order of the prompts.

        Prompts are grouped by the length of their answers, so that a long prompt does not shorten
        the answers to the others.
        """
        answers = [None] * len(self.prompts)
        for length in np.unique(self.max_lengths):
            rows = np.flatnonzero(self.max_lengths == length)
            batch = self.batch if len(rows) == len(self.prompts) else _select(self.batch, rows)
            try:
                generated = generate_rows(batch, int(length))
            except NonFiniteLogits as error:
                raise error.about(question(self.prompts[rows[error.row]])) from None
            for row, answer in zip(rows, generated, strict=True):
                answers[row] = answer
        return answers

    def _ids(self, params, batch: Batch, length: int) -> np.ndarray:
        """Generates the tokens of the answers to the prompts of a batch, (B, length)."""
        return jax.device_get(
            generate(self.model.cfg, params, batch, length, self._sampling, self._key)
        )

    def _texts_to_stop(self, params, batch: Batch, length: int) -> list[str]:
        """Generates answers until each has a stop string.

        Stop strings are found in the text, which the device does not have.
        """
        texts = [self.answer_text() for _ in batch.tokens]
        answers = [""] * len(texts)
        for tokens in stream(self.model.cfg, params, batch, length, self._sampling, self._key):
            for row, text in enumerate(texts):
                answers[row] += text.feed(int(tokens[row]))
            if all(text.is_ended for text in texts):
                break
        return [answer + text.end() for answer, text in zip(answers, texts, strict=True)]

    def stream(self, params) -> Iterator[str]:
        """Yields the answer to a single prompt in pieces, each as soon as it is generated.

        Raises:
          NonFiniteLogits: the model computes NaN.
        """
        (prompt,), (length,) = self.prompts, self.max_lengths
        text = self.answer_text()
        tokens = stream(self.model.cfg, params, self.batch, int(length), self._sampling, self._key)
        try:
            for (token,) in tokens:
                yield text.feed(int(token))
                if text.is_ended:
                    break
        except NonFiniteLogits as error:
            raise error.about(question(prompt)) from None
        yield text.end()

    def answer_text(self) -> AnswerText:
        """Returns the empty text of an answer, which takes its tokens."""
        return self.options.answer_text(self.processor)

    @property
    def _sampling(self) -> SamplingParams:
        return self.options.sampling(self.processor.eos_ids)

    @property
    def _key(self) -> jax.Array:
        return jax.random.key(self.options.seed)


def encode(
    model: nn.Module,
    processor: Processor,
    prompts: Sequence[str | ChatPrompt],
    images: ImageInputs,
    options: AnswerOptions,
    pad_to_multiple_of: int = 1,
) -> Request:
    """Encodes prompts and their images.

    Args:
      pad_to_multiple_of: as of a `Processor`; requests of one shape are compiled once.

    Raises:
      ConfigError: an option is out of range, the model is an encoder, a prompt is too long, or the
        images do not match the prompts.
    """
    options.check()
    if not isinstance(model, VLM):
        raise ConfigError("the model is an encoder and cannot generate text.")
    multiple = pad_multiple(model.cfg, pad_to_multiple_of)
    batch = processor(prompts, images, chat=options.chat, pad_to_multiple_of=multiple)
    max_positions = model.cfg.decoder.max_positions
    free = max_positions - 1 - np.max(batch.positions, axis=1)  # (B,)
    if min(free) < 1:
        longest = question(prompts[int(np.argmin(free))])
        raise ConfigError(
            f"the prompt {longest[:SHOWN_CHARACTERS]!r} is too long: decoder.max_positions "
            f"{max_positions} leaves no room for an answer."
        )
    max_lengths = np.minimum(options.max_new_tokens, free)
    return Request(model, processor, prompts, batch, max_lengths, options)


def answer(
    model: nn.Module,
    params,
    processor: Processor,
    prompts: Prompts,
    images: ImageInputs,
    options: AnswerOptions,
) -> list[str]:
    """Implements `vlm_jax.generate`."""
    prompts = [prompts] if isinstance(prompts, str | ChatPrompt) else prompts
    if not prompts:
        return []
    request = encode(model, processor, prompts, images, options, LENGTH_MULTIPLE)
    return request.answers(params)


def pad_multiple(cfg: Model, multiple: int) -> int:
    """Returns 1 instead for a table of learned positions, which has no slots for more padding."""
    return 1 if cfg.decoder.positions == "learned" else multiple


def question(prompt: str | ChatPrompt) -> str:
    """Returns the text of a prompt, or the last turn of a conversation."""
    return prompt if isinstance(prompt, str) else prompt.turns[-1]


def _select(batch: Batch, rows: np.ndarray) -> Batch:
    """Selects rows of a batch, and keeps the images of all rows."""
    images = image_arrays(batch)
    image_rows = batch.image_rows
    if image_rows is None:
        image_rows = np.arange(len(batch.tokens), dtype=np.int32)
    text = batch.replace(**dict.fromkeys(images), image_rows=image_rows)
    return jax.tree.map(lambda x: x[rows], text).replace(**images)
