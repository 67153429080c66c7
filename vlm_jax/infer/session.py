"""A conversation with a model, with the KV cache kept from turn to turn.

Every turn is encoded as the whole conversation, as in training. Its tokens are compared with the
cached ones, and only the tokens after the common prefix are computed. The answer therefore equals
the answer to the whole conversation read anew, whatever a chat template does to earlier turns.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlm_jax.config import ConfigError
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.hub.images.steps import ImageInput
from vlm_jax.hub.text.prompts import ChatPrompt
from vlm_jax.infer import prefix, rows
from vlm_jax.infer.answer import AnswerOptions, Request, encode
from vlm_jax.infer.generate import NonFiniteLogits, check_finite
from vlm_jax.infer.processor import Processor
from vlm_jax.nn import longrope
from vlm_jax.runtime.workdir import write_atomic
from vlm_jax.structs import NO_IMAGE, PADDING, Batch, image_arrays, map_token_fields, without_images

LEAST_CHUNK = 16  # tokens that are read together, rounded up to a power of two
LEAST_SLOTS = 256  # of a cache, which grows by `rows.room`


@dataclass(frozen=True)
class _Cached:
    """Tokens in the KV cache of a conversation, and what they depend on."""

    prompt: Batch  # with images
    generated: tuple[int, ...]  # tokens after the prompt
    image_tokens: jax.Array | None  # (1, T, D) of all images
    layers: list  # as in `structs.Cache`
    slots: int

    @property
    def tokens(self) -> Batch:
        """All tokens, without images."""
        return rows.append(without_images(self.prompt), self.generated)


@dataclass
class Session:
    """A conversation; `ask` adds a turn.

    A model without a form for conversations, such as a run of single questions, is asked every
    question alone, about the last images.

    Attributes:
      turns: question, answer, question, ..., with <image> at the place of every image.
      images: of all turns, in the order of their placeholders.
      answer_ids: tokens of each answer that was generated here.
      system: text of the system turn; None: none.
      computed_tokens: number of tokens of the last prompt that were not in the cache.
      encoded_images: number of images (views of tiled ones) that the last prompt added.
    """

    model: nn.Module
    params: dict
    processor: Processor
    options: AnswerOptions = AnswerOptions()
    system: str | None = None
    turns: list[str] = field(default_factory=list)
    images: list[ImageInput] = field(default_factory=list)
    answer_ids: list[list[int]] = field(default_factory=list)
    computed_tokens: int = 0
    encoded_images: int = 0
    _blocks: list | None = None
    _cached: _Cached | None = None

    def ask(self, question: str, images: Sequence[ImageInput] = ()) -> Iterator[str]:
        """Yields the answer to a question in pieces, each as soon as it is generated.

        The turn is added when the answer is complete. If the iterator is closed before, or Ctrl-C
        stops it, the turn is added with the answer so far.

        Args:
          question: text; images without an <image> in it precede it.
          images: of this question.

        Raises:
          UserError: the images do not match the question, or the conversation is too long.
          NonFiniteLogits: the model computes NaN.
        """
        question = with_placeholders(question, len(images))
        prompt, shown = self._prompt(question, images)
        request = encode(self.model, self.processor, [prompt], [shown], self.options)
        text = request.answer_text()
        answer, ids, is_failed = "", [], True
        try:
            for token in self._generate(request.batch, int(request.max_lengths[0])):
                ids.append(token)
                piece = text.feed(token)
                answer += piece
                yield piece
                if text.is_ended:
                    break
            rest = text.end()
            answer += rest
            is_failed = False
            yield rest
        except NonFiniteLogits as error:
            raise error.about(question) from None
        except (GeneratorExit, KeyboardInterrupt):
            is_failed = False
            raise
        finally:
            if not is_failed:
                # In a turn it would be the place of an image.
                self.turns += [question, answer.replace(IMAGE_PLACEHOLDER, "")]
                self.images += images
                self.answer_ids.append(ids)

    def undo(self) -> bool:
        """Removes the last question with its answer; returns False if there is none."""
        if not self.turns:
            return False
        count = self.turns[-2].count(IMAGE_PLACEHOLDER)
        del self.turns[-2:]
        del self.images[len(self.images) - count :]
        del self.answer_ids[-1:]
        return True

    def reset(self) -> None:
        """Removes all turns and images; the system turn stays."""
        self.turns.clear()
        self.images.clear()
        self.answer_ids.clear()

    def take_cache(self, other: "Session") -> None:
        """Takes the KV cache of another conversation with the same model, which loses it.

        The next prompt uses what both have in common: several conversations need the memory of one.
        """
        self._cached, other._cached = other._cached, None
        self._blocks = self._blocks or other._blocks

    def encode_turn(self, number: int) -> tuple[Request, list[ImageInput]]:
        """Encodes the prompt of an earlier answer again; returns it with its images.

        `number` counts the answers from 0.
        """
        earlier = self.turns[: 2 * number]
        question = self.turns[2 * number]
        before = sum(turn.count(IMAGE_PLACEHOLDER) for turn in earlier)
        until = before + question.count(IMAGE_PLACEHOLDER)
        past = replace(self, turns=earlier, images=self.images[:before])
        prompt, images = past._prompt(question, self.images[before:until])
        return encode(self.model, self.processor, [prompt], [images], self.options), images

    def _prompt(
        self, question: str, images: Sequence[ImageInput]
    ) -> tuple[ChatPrompt, list[ImageInput]]:
        """Returns the prompt of a question, and all its images."""
        if self.processor.takes_conversations:
            return ChatPrompt((*self.turns, question), self.system), [*self.images, *images]
        if images:
            return ChatPrompt((question,), self.system), list(images)
        counts = [turn.count(IMAGE_PLACEHOLDER) for turn in self.turns]
        count = next((count for count in reversed(counts) if count), 0)
        shown = self.images[len(self.images) - count :]
        return ChatPrompt((with_placeholders(question, count),), self.system), shown

    def _generate(self, prompt: Batch, new_tokens: int) -> Iterator[int]:
        """Yields at most `new_tokens` tokens, and keeps the cache of all but the last."""
        cfg, options = self.model.cfg, self.options
        prompt = rows.with_own_images(prompt)
        # Its buffers are donated to the next program, so an error must not leave it behind.
        cached, self._cached = self._cached, None
        start = self._shared_tokens(cached, prompt)
        image_tokens = self._image_tokens(cached, prompt)
        length = prompt.tokens.shape[1]
        self.computed_tokens = length - start
        chunk = rows.power_of_two(length - start, LEAST_CHUNK)
        if cfg.decoder.positions == "learned":
            chunk = min(chunk, cfg.decoder.max_positions)
        needed = max(length + new_tokens, start + chunk)
        slots = rows.room(needed, LEAST_SLOTS)
        if cached is None:
            layers = rows.new_layers(cfg, self.params, 1, slots)
        else:
            slots = max(slots, cached.slots)
            layers = rows.grow(cached.layers, slots)
        text = without_images(prompt)
        tokens = map_token_fields(lambda x: x[:, start:], text)
        reads_images = (np.asarray(tokens.image_token_index) != NO_IMAGE).any()
        # Keys and values of the images are in the cache of cross-attention, unless one is new.
        if start and not reads_images and image_tokens is cached.image_tokens:
            new_image_tokens = None
        else:
            new_image_tokens = image_tokens
        sampling = rows.RowSampling.stack([options.sampling(self.processor.eos_ids)])
        state, choice = rows.read(
            cfg,
            self.params,
            rows.pad(tokens, after=chunk - (length - start)),
            new_image_tokens,
            rows.cache_of(text, layers, start, slots),
            length - start - 1,
            sampling,
            rows.row_keys([options.seed]),
        )
        if self._blocks is None:
            self._blocks = rows.decoder_blocks(cfg, self.params)
        last = rows.select_slot(prompt, length - 1)
        generated = []
        new = np.asarray(choice.token)[None]  # (tokens, 1)
        while True:
            (failed,) = np.asarray(state.failed)
            check_finite(np.array([failed, 0]), self.params)
            generated += new[:, 0].tolist()
            cached_tokens = tuple(generated[:-1])
            self._cached = _Cached(prompt, cached_tokens, image_tokens, state.cache.layers, slots)
            yield from new[:, 0].tolist()
            count = min(rows.CHUNK_TOKENS, new_tokens - len(generated))
            if count <= 0:
                return
            self._cached = None
            state, choice = rows.advance(
                cfg, self._blocks, self.params, last, state, sampling, count
            )
            new = np.asarray(choice.token)[:count]

    def _shared_tokens(self, cached: _Cached | None, prompt: Batch) -> int:
        """Returns the number of leading tokens of a prompt whose keys and values are cached."""
        cfg = self.model.cfg
        # A long text changes the keys of all tokens before it.
        if cached is None or longrope.may_recompute(cfg.decoder.rope):
            return 0
        images = prefix.count_images(cached.prompt, prompt)
        limit = self._count_image_tokens(cached, images) if images else 0
        return prefix.count_tokens(cfg, cached.tokens, prompt, images, limit)

    def _image_tokens(self, cached: _Cached | None, prompt: Batch) -> jax.Array | None:
        """Returns the tokens (1, T, D) of all images, and encodes only new ones."""
        self.encoded_images = 0
        if not self.model.cfg.fusion.has_images or prompt.images is None:
            return None
        count = prompt.images.shape[1]
        shared = 0 if cached is None else prefix.count_images(cached.prompt, prompt)
        if shared and shared == count == cached.prompt.images.shape[1]:
            return cached.image_tokens
        parts = []
        if shared:
            parts.append(cached.image_tokens[:, : self._count_image_tokens(cached, shared)])
        if shared < count:
            arrays = image_arrays(prompt) | {"map_memory": None}
            new = jax.tree.map(lambda x: x[:, shared:], arrays)
            self.encoded_images = count - shared
            if prompt.patch_images is not None:
                # The new images count from 1.
                before = prefix.count_packed(prompt, shared)
                new["patch_images"] = np.maximum(np.asarray(new["patch_images"]) - before, PADDING)
                new["image_mask"] = prompt.image_mask[..., before:]
                self.encoded_images = len(np.unique(new["patch_images"][new["patch_images"] > 0]))
            parts.append(rows.encode_images(self.model.cfg, self.params, prompt.replace(**new)))
        return jnp.concatenate(parts, axis=1)

    def _count_image_tokens(self, cached: _Cached, images: int) -> int:
        """Returns the number of tokens of the first images (at native resolution patches)."""
        cfg = self.model.cfg
        if cfg.vision.is_native and not cfg.has_tokens_by_size:
            return prefix.count_packed(cached.prompt, images) * cfg.image_tokens
        return images * cached.image_tokens.shape[1] // cached.prompt.images.shape[1]


def with_placeholders(question: str, count: int) -> str:
    """Returns a question with `count` placeholders before it, unless it has placeholders."""
    if IMAGE_PLACEHOLDER in question:
        return question
    return "\n".join([*[IMAGE_PLACEHOLDER] * count, question])


def save_conversation(session: Session, path: Path) -> None:
    """Writes a conversation as a JSON file in LLaVA's form, with absolute paths of its images.

    Raises:
      ConfigError: there is no turn, or an image is not a file.
    """
    if not session.turns:
        raise ConfigError("there is no turn to save.")
    files = [image for image in session.images if isinstance(image, str)]
    if len(files) != len(session.images):
        raise ConfigError("an image of the conversation is not a file.")
    messages = [{"from": "system", "value": session.system}] if session.system else []
    for number, turn in enumerate(session.turns):
        messages.append({"from": ("human", "gpt")[number % 2], "value": turn})
    record = {"id": path.stem, "conversations": messages}
    if files:
        record["image"] = files
    write_atomic(path, json.dumps([record], ensure_ascii=False, indent=2) + "\n")
