"""Text and images -> what a checkpoint's model reads, as the files beside its weights say."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data.conversation_files import IMAGE_PLACEHOLDER
from vlm_jax.hub.images.processor import ImageProcessor, ProcessedImages
from vlm_jax.hub.images.steps import ImageInput, ImageInputs, to_rows
from vlm_jax.hub.inputs import reading_own_images, scored, to_batch
from vlm_jax.hub.load import Checkpoint
from vlm_jax.hub.text.chat_template import ChatTemplate
from vlm_jax.hub.text.dialogue import Dialogue, decoder_start_ids
from vlm_jax.hub.text.prompt_formats import (
    Prompt,
    TextFormat,
    check_answers,
    load_prompt_format,
    stack_prompts,
)
from vlm_jax.hub.text.tokenizer import HubTokenizer, has_tokenizer
from vlm_jax.structs import Batch


@dataclass(frozen=True)
class Processor:
    """What a folder says about text and images; a part that the model does not need, or the folder lacks, is None."""

    checkpoint: Checkpoint
    tokenizer: HubTokenizer | None
    images: ImageProcessor | None
    template: ChatTemplate | None
    form: TextFormat | None

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> "Processor":
        """Reads the files of a checkpoint's folder.

        Raises:
          ConfigError: a file that is needed is damaged or says nothing that is understood.
        """
        folder, cfg = checkpoint.folder, checkpoint.cfg
        tokenizer = HubTokenizer.load(folder) if has_tokenizer(folder) else None
        reads_images = not isinstance(cfg, Experiment) or cfg.fusion.has_images
        return cls(
            checkpoint,
            tokenizer,
            ImageProcessor.load(folder)
            if reads_images and _holds_any(folder, IMAGE_FILES)
            else None,
            ChatTemplate.load(folder) if tokenizer else None,
            load_prompt_format(folder, tokenizer)
            if tokenizer and isinstance(cfg, Experiment)
            else None,
        )

    def __call__(
        self,
        prompts: str | Sequence[str],
        images: ImageInputs = (),
        add_special_tokens: bool = True,
        chat: bool = False,
        answers: Sequence[str] | None = None,
    ) -> Batch:
        """Prompts as they are and the images of each -> a batch to continue, or to train on, padded on the left.

        A row gives the same outputs whatever the other rows are.

        Args:
          images: one list for each prompt, or another nesting that `image_steps.to_rows` accepts. An image is a file,
            an open PIL image, or a uint8 array (height, width, 3).
          add_special_tokens: whether the tokenizer puts its own around a prompt that does not begin with them.
          chat: whether prompts are messages of a user, to be formatted by the chat template if the folder has one.
          answers: one for each prompt: the batch has them and an end of text behind the prompts, and `targets` and
            `loss_weights` that score them.

        Raises:
          ConfigError: the images or answers do not match the prompts, or the folder lacks a tokenizer or an image
            processor.
        """
        cfg, prompts = self.checkpoint.cfg, [prompts] if isinstance(prompts, str) else prompts
        if self.form is None:
            raise ConfigError(
                f"{self.checkpoint.folder} holds no tokenizer, or its model reads no text."
            )
        if (
            not isinstance(prompts, list | tuple)
            or not prompts
            or not all(isinstance(text, str) for text in prompts)
        ):
            raise ConfigError(f"prompts is {prompts!r}: it must be text, or a list of texts.")
        images = to_rows(images, prompts, self.image_token)
        ends = None if answers is None else self._answer_ids(prompts, images, answers, chat)
        if chat:
            prompts = [
                self.chat(prompt, len(row)) for prompt, row in zip(prompts, images, strict=True)
            ]
            # As in transformers: a tokenizer's template writes all special tokens, a processor's perhaps not bos.
            add_special_tokens = self.template is None or cfg.fusion.has_images
        processed = self.pixels(images)
        made = self._prompts(
            prompts, _facts(processed, [len(row) for row in images]), add_special_tokens
        )
        if ends is not None:
            made = [prompt.with_answer(ids) for prompt, ids in zip(made, ends, strict=True)]
        arrays = stack_prompts(made, self.tokenizer.pad_id or 0)
        if cfg.fusion.is_encoder_decoder:
            arrays = {f"decoder_{name}": x for name, x in arrays.items()}
        batch = to_batch(
            cfg, arrays | _arrays(processed), self.checkpoint.image_token, generating=True
        )
        batch = batch if batch.tile_layouts is None else reading_own_images(batch)
        return batch if ends is None else scored(batch, list(map(len, ends)))

    def _prompts(
        self, prompts: Sequence[str], facts: list[list], add_special_tokens: bool
    ) -> list[Prompt]:
        """Tokens of each prompt, given what counts of its images."""
        if self.checkpoint.cfg.fusion.is_encoder_decoder:
            start = decoder_start_ids(self.checkpoint.folder, self.tokenizer)
            rows = (
                [*start, *self.tokenizer.encode(text, add_special_tokens=False)] for text in prompts
            )
            return [Prompt(np.array(row, np.int32)) for row in rows]
        bos = self.tokenizer.special_tokens.get("bos_token", "")
        made = [
            self.form.prompt(
                text, images, add_special_tokens and not (bos and text.startswith(bos))
            )
            for text, images in zip(prompts, facts, strict=True)
        ]
        if not all(len(prompt.input_ids) for prompt in made):
            raise ConfigError("the prompt is empty: there is no token to continue.")
        return made

    def _answer_ids(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[ImageInput]],
        answers: Sequence[str],
        chat: bool,
    ) -> list[list[int]]:
        """Tokens of each answer and what ends it, as training on the checkpoint's conversations has them."""
        check_answers(answers, prompts)
        dialogue = self._dialogue
        if not chat or self.template is None:
            return [
                [*self.tokenizer.encode(text, add_special_tokens=False), dialogue.eos_id]
                for text in answers
            ]
        ends = []
        for prompt, row, answer in zip(prompts, images, answers, strict=True):
            tokens = dialogue.encode([f"{IMAGE_PLACEHOLDER}\n" * len(row) + prompt, answer])
            ends.append([i for i, is_scored in zip(tokens.ids, tokens.is_scored) if is_scored])
        return ends

    @functools.cached_property
    def _dialogue(self) -> Dialogue:
        """Read once: a training loop asks for every batch."""
        return Dialogue.load(self.checkpoint.folder, self.checkpoint.cfg.fusion.has_images)

    def asked(self, prompt: str, images: ImageInputs = ()) -> Batch:
        """What a user says about images, in the words of the chat template if there is one -> a batch to continue.

        Raises:
          ConfigError: what `__call__` raises, or the template fails.
        """
        return self([prompt], to_rows(images, [prompt]), chat=True)

    @property
    def image_token(self) -> str:
        """Text of the placeholder of an image; "" if the family has none."""
        return getattr(self.form, "image_token", "")

    def pixels(self, images: Sequence[Sequence[ImageInput]]) -> ProcessedImages | None:
        """Images of every row as the encoder reads them; None if no row has any."""
        if not any(images):
            return None
        if self.images is None:
            raise ConfigError(
                f"{self.checkpoint.folder} holds no {' or '.join(IMAGE_FILES)}: it says nothing of images."
            )
        return self.images(images)

    def chat(self, prompt: str, images: int) -> str:
        """What a user says about so many images, as the checkpoint's chat template has it, or with its image tokens.

        A prompt that has image tokens of its own keeps them where they are, and gets no others.
        """
        token = self.image_token
        if token and token in prompt:
            images = 0
        if self.template is None:
            return token * images + prompt
        special = self.tokenizer.special_tokens
        if self.template.accepts_lists(special):
            content: Any = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
        else:
            content = f"{token * images}\n{prompt}" if images else prompt
        return self.template.render(
            [{"role": "user", "content": content}], special, add_generation_prompt=True
        )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens of which each ends an answer."""
        return self.tokenizer.eos_ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of an answer, up to the first token that ends it."""
        ends = self.eos_ids
        return self.tokenizer.decode(itertools.takewhile(lambda i: i not in ends, map(int, ids)))


IMAGE_FILES = ("preprocessor_config.json", "processor_config.json", "open_clip_config.json")


def _holds_any(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def _facts(processed: ProcessedImages | None, counts: Sequence[int]) -> list[list]:
    """Of every image of every row what counts in the text: its tiles, its grid of patches, or its size in pixels."""
    if processed is None:
        return [[] for _ in counts]
    if processed.num_tiles is not None:
        return processed.num_tiles
    if processed.grids is not None:
        facts = iter([tuple(map(int, grid)) for grid in processed.grids])
    else:
        facts = iter([processed.pixel_values.shape[1:3]] * sum(counts))
    return [list(itertools.islice(facts, count)) for count in counts]


def _arrays(processed: ProcessedImages | None) -> dict[str, np.ndarray]:
    """By the names and in the layout of transformers."""
    if processed is None:
        return {}
    if processed.grids is not None:
        return {"pixel_values": processed.pixel_values}
    arrays = {"pixel_values": np.moveaxis(processed.pixel_values, -1, -3)}
    if processed.num_tiles is None:
        return arrays
    return arrays | {
        "aspect_ratio_ids": processed.aspect_ratio_ids,
        "aspect_ratio_mask": processed.aspect_ratio_mask,
    }
