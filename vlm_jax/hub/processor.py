"""Encodes prompts and images for a public checkpoint, from the files beside its weights."""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.hub.image_inputs import count_map_tokens, map_sizes, row_by_row
from vlm_jax.hub.images.processor import ImageProcessor, ProcessedImages
from vlm_jax.hub.images.steps import (
    ImageInput,
    ImageInputs,
    PixelScale,
    pixel_scale,
    to_rows,
)
from vlm_jax.hub.inputs import mask_images_of_other_rows, to_batch, with_targets
from vlm_jax.hub.load import Checkpoint
from vlm_jax.hub.text.chat_template import ChatTemplate
from vlm_jax.hub.text.dialogue import Dialogue, decoder_start_ids
from vlm_jax.hub.text.prompt_formats import TextFormat, load_prompt_format
from vlm_jax.hub.text.prompts import (
    ChatPrompt,
    Prompt,
    Prompts,
    as_prompt_list,
    check_answers,
    stack_prompts,
)
from vlm_jax.hub.text.tokenizer import HubTokenizer, TextStream, has_tokenizer
from vlm_jax.structs import Batch


@dataclass(frozen=True)
class HubProcessor:
    """Implements `infer.processor.Processor` for a public checkpoint.

    Attributes are None where the model does not need the part, or the folder lacks it.
    """

    checkpoint: Checkpoint
    tokenizer: HubTokenizer | None
    images: ImageProcessor | None
    template: ChatTemplate | None
    form: TextFormat | None

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> "HubProcessor":
        """Reads the tokenizer, image processor and chat template of a checkpoint's folder.

        Raises:
          CheckpointError: a file that the model needs is damaged or not supported.
        """
        folder = checkpoint.folder
        writes_text = isinstance(checkpoint.cfg, Experiment)
        tokenizer = images = template = form = None
        if has_tokenizer(folder):
            tokenizer = HubTokenizer.load(folder)
            template = ChatTemplate.load(folder)
            form = load_prompt_format(folder, tokenizer) if writes_text else None
        has_images = checkpoint.cfg.fusion.has_images if writes_text else True
        if has_images and any((folder / name).is_file() for name in IMAGE_FILES):
            images = ImageProcessor.load(folder)
        return cls(checkpoint, tokenizer, images, template, form)

    def __call__(
        self,
        prompts: Prompts,
        images: ImageInputs = (),
        add_special_tokens: bool = True,
        chat: bool = False,
        answers: Sequence[str] | None = None,
        pad_to_multiple_of: int = 1,
    ) -> Batch:
        """Encodes prompts and their images as a left-padded batch, to continue or to train on.

        A row gives the same outputs whatever the other rows are.

        Args:
          prompts: texts, or conversations, which need `chat`; a single one is a batch of one.
          images: one list for each prompt, or another nesting that `steps.to_rows` accepts. An
            image is a file, an open PIL image, or a uint8 array (height, width, 3).
          add_special_tokens: lets the tokenizer add its special tokens to a prompt that does not
            begin with bos.
          chat: formats each prompt as a user message by the chat template, if the folder has one.
          answers: one for each prompt. The batch then has the answer and an end-of-text token after
            each prompt, and the `targets` and `loss_weights` that score them.
          pad_to_multiple_of: S is rounded up to a multiple of it, so that batches share a shape.

        Raises:
          ConfigError: the images or answers do not match the prompts, or the folder lacks a
            tokenizer or an image processor.
        """
        cfg, prompts = self.checkpoint.cfg, self._check_prompts(prompts, chat)
        texts = [prompt if isinstance(prompt, str) else self.chat(prompt) for prompt in prompts]
        images = to_rows(images, texts, self.image_token)
        answer_ids = None
        if answers is not None:
            answer_ids = self._answer_ids(prompts, images, answers, chat)
        if chat:
            texts = [
                self.chat(prompt, len(row)) for prompt, row in zip(prompts, images, strict=True)
            ]
            # As in transformers: a tokenizer's template writes every special token, a processor's
            # may leave out bos.
            add_special_tokens = self.template is None or cfg.fusion.has_images

        processed = self.pixels(images)
        counts = [len(row) for row in images]
        image_arrays = _image_arrays(processed, counts if cfg.fusion.placeholder else None)
        layouts = _image_layouts(cfg, processed, image_arrays, counts)
        encoded = self._encode_prompts(texts, layouts, add_special_tokens)
        if answer_ids is not None:
            encoded = [
                prompt.with_answer(ids) for prompt, ids in zip(encoded, answer_ids, strict=True)
            ]

        arrays = stack_prompts(encoded, self.tokenizer.pad_id or 0, pad_to_multiple_of)
        if cfg.fusion.is_encoder_decoder:
            arrays = {f"decoder_{name}": x for name, x in arrays.items()}
        arrays |= image_arrays
        batch = to_batch(cfg, arrays, self.checkpoint.image_token, generating=True)
        if batch.tile_layouts is not None:
            batch = mask_images_of_other_rows(batch)
        if answer_ids is not None:
            batch = with_targets(batch, [len(ids) for ids in answer_ids])
        return batch

    def _check_prompts(self, prompts: Prompts, chat: bool) -> Sequence[str | ChatPrompt]:
        if self.form is None:
            raise ConfigError(
                f"{self.checkpoint.folder} has no tokenizer, or its model takes no text."
            )
        prompts = as_prompt_list(prompts)
        if not chat and not all(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError("chat is False, but a prompt is a conversation: give its text.")
        return prompts

    def _encode_prompts(
        self, prompts: Sequence[str], layouts: list[list], add_special_tokens: bool
    ) -> list[Prompt]:
        """Tokenizes each prompt; `layouts` are of `_image_layouts`."""
        if self.checkpoint.cfg.fusion.is_encoder_decoder:
            start = decoder_start_ids(self.checkpoint.folder, self.tokenizer)
            encoded = [self.tokenizer.encode(text, add_special_tokens=False) for text in prompts]
            return [Prompt(np.array([*start, *ids], np.int32)) for ids in encoded]
        bos = self.tokenizer.special_tokens.get("bos_token", "")
        encoded = []
        for text, images in zip(prompts, layouts, strict=True):
            begins_with_bos = bos != "" and text.startswith(bos)
            encoded.append(
                self.form.prompt(text, images, add_special_tokens and not begins_with_bos)
            )
        if not all(len(prompt.input_ids) for prompt in encoded):
            raise ConfigError("the prompt is empty: there is no token to continue.")
        return encoded

    def _answer_ids(
        self,
        prompts: Sequence[str | ChatPrompt],
        images: Sequence[Sequence[ImageInput]],
        answers: Sequence[str],
        chat: bool,
    ) -> list[list[int]]:
        """Tokens of each answer and its end, as in training on the checkpoint's conversations."""
        check_answers(answers, prompts)
        dialogue = self._dialogue
        if not chat or self.template is None:
            encoded = [self.tokenizer.encode(text, add_special_tokens=False) for text in answers]
            return [[*ids, dialogue.eos_id] for ids in encoded]
        encoded = []
        for prompt, row, answer in zip(prompts, images, answers, strict=True):
            if isinstance(prompt, str):
                placeholders = [IMAGE_PLACEHOLDER] * len(row)
                prompt = ChatPrompt(("\n".join([*placeholders, prompt]),))
            tokens = dialogue.encode([*prompt.turns, answer], prompt.system)
            # Answers before the last question belong to the prompt.
            last_unscored = np.flatnonzero(~np.array(tokens.is_scored))[-1]
            encoded.append(tokens.ids[last_unscored + 1 :])
        return encoded

    # Cached because a training loop encodes answers for every batch.
    @functools.cached_property
    def _dialogue(self) -> Dialogue:
        return Dialogue.load(self.checkpoint.folder, self.checkpoint.cfg.fusion.has_images)

    @property
    def image_token(self) -> str:
        """Text of an image placeholder; "" if the family has none."""
        return getattr(self.form, "image_token", "")

    def pixels(self, images: Sequence[Sequence[ImageInput]]) -> ProcessedImages | None:
        """Preprocesses the images of every row for the encoder; None if no row has an image."""
        if not any(images):
            return None
        if self.images is None:
            raise ConfigError(
                f"{self.checkpoint.folder} has no image preprocessing config "
                f"({' or '.join(IMAGE_FILES)})."
            )
        return self.images(images)

    def tile_grids(self, images: Sequence[ImageInput]) -> list[tuple[int, int]] | None:
        """Returns the rows and columns of tiles that each image is cut into; None: it is not."""
        processed = self.pixels([images])
        return None if processed is None else processed.tile_grids

    def chat(self, prompt: str | ChatPrompt, images: int = 0) -> str:
        """Formats a user message about `images` images by the chat template, or by adding image
        tokens.

        A prompt that already has image tokens gets no others; a conversation has its own.
        """
        if isinstance(prompt, ChatPrompt):
            return self._dialogue.prompt_text(prompt.turns, prompt.system)
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

    def pixel_scale(self) -> PixelScale:
        """Returns the scale of the pixel values of a batch."""
        return pixel_scale(self.images.settings)

    @property
    def takes_conversations(self) -> bool:
        """True if a prompt may have turns before its question: there is a chat template."""
        return self.template is not None

    @property
    def takes_system_turn(self) -> bool:
        """True if a conversation may begin with a system turn."""
        return self.template is not None and self._dialogue.takes_system_turn

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""
        return self.tokenizer.eos_ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of an answer up to its end token."""
        ends = self.eos_ids
        return self.tokenizer.decode(itertools.takewhile(lambda i: i not in ends, map(int, ids)))

    def decode_stream(self) -> TextStream:
        """Returns a decoder that takes the ids of an answer as they are generated."""
        return self.tokenizer.stream()


IMAGE_FILES = ("preprocessor_config.json", "processor_config.json", "open_clip_config.json")


def _image_layouts(
    cfg: Experiment,
    processed: ProcessedImages | None,
    arrays: Mapping[str, np.ndarray],
    counts: Sequence[int],
) -> list[list]:
    """Size of every image of every row as its prompt needs it: tile count, grid of patches or of
    tiles, (height, width) in pixels, or number of tokens.

    `arrays` are of `_image_arrays`, `counts` the number of images of each row.
    """
    if processed is None:
        return [[] for _ in counts]
    if processed.num_tiles is not None:
        return processed.num_tiles
    if processed.grids is not None:
        layouts = iter([tuple(map(int, grid)) for grid in processed.grids])
    elif processed.image_sizes is not None and cfg.vision.is_native:
        layouts = iter(processed.image_sizes)
    elif processed.image_sizes is not None:
        layouts = iter([count_map_tokens(cfg, size) for size in map_sizes(arrays)])
    elif processed.tile_grids is not None:
        layouts = iter(processed.tile_grids)
    else:
        layouts = iter([processed.pixel_values.shape[1:3]] * sum(counts))
    return [list(itertools.islice(layouts, count)) for count in counts]


def _image_arrays(
    processed: ProcessedImages | None, counts: Sequence[int] | None
) -> dict[str, np.ndarray]:
    """Arrays with the names and in the layout of transformers.

    Args:
      counts: number of images of each row, if the model takes rows of images (Idefics).
    """
    if processed is None:
        return {}
    if processed.grids is not None:
        frames = np.ones((len(processed.grids), 1), np.int32)
        grids = np.concatenate([frames, processed.grids], axis=1)
        return {"pixel_values": processed.pixel_values, "image_grid_thw": grids}
    arrays = {"pixel_values": np.moveaxis(processed.pixel_values, -1, -3)}
    if processed.image_sizes is not None:
        arrays["image_sizes"] = np.array(processed.image_sizes)
        if processed.batch_num_images is not None:
            arrays["batch_num_images"] = np.array(processed.batch_num_images)
        return arrays
    if processed.num_tiles is None:
        if counts is not None:
            arrays["pixel_values"] = row_by_row(arrays["pixel_values"], np.array(counts))
        return arrays
    return arrays | {
        "aspect_ratio_ids": processed.aspect_ratio_ids,
        "aspect_ratio_mask": processed.aspect_ratio_mask,
    }
