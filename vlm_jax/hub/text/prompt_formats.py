"""Prompts with images, as the processors of transformers 5.23 write them (`models/*/processing_*.py`).

llava      <s> USER: <image> <image> <image> <image> what is it? ASSISTANT:     N tokens for every <image> of the text
paligemma  <image> <image> <image> <image> <bos> what is it? \\n                 the same, if only at the start
fuyu       |SPEAKER| |SPEAKER| |NEWLINE| |SPEAKER| |SPEAKER| |NEWLINE| <s> what is it? <0x04>
mllama     <|image|> <|begin_of_text|> what is it?                              one token an image, and a mask
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import CheckpointError
from vlm_jax.hub.tensors.folder import read_json
from vlm_jax.hub.tensors.mapped import all_nonnegative_ints
from vlm_jax.hub.text.special_tokens import read_if_there
from vlm_jax.hub.text.tokenizer import HubTokenizer
from vlm_jax.hub.text.tokenizer_files import CONFIG

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
MOST_BESIDE = 1024  # tokens of an image beside those of its patches


@dataclass(frozen=True)
class Prompt:
    input_ids: np.ndarray  # (T,) int32
    token_type_ids: np.ndarray | None = None  # (T,) int32; 0: what sees all of the prompt
    cross_attention_mask: np.ndarray | None = (
        None  # (T, I, J) int32; 1: this token reads tile J of image I
    )

    def with_answer(self, ids: Sequence[int]) -> "Prompt":
        """The prompt and the tokens of its answer, which read what the last token of the prompt reads."""
        types, mask, count = self.token_type_ids, self.cross_attention_mask, len(ids)
        return Prompt(
            np.concatenate([self.input_ids, _ids(ids)]),
            None if types is None else np.pad(types, (0, count), constant_values=1),
            None if mask is None else np.concatenate([mask, np.repeat(mask[-1:], count, axis=0)]),
        )


@dataclass(frozen=True)
class TextFormat:
    """A family whose images, if it reads any, leave no trace in the text."""

    tokenizer: HubTokenizer

    # The text of the token that stands for an image in a text; "": images come before the text.
    image_token = ""
    # Whether the tokenizer may put its own tokens around the text; otherwise `frame` writes all of them.
    takes_bos = True
    # Whether a prompt without a chat template is more than its text and its images.
    has_own_form = False

    @classmethod
    def read(
        cls, tokenizer: HubTokenizer, config: Mapping, processor: Mapping, images: Mapping
    ) -> "TextFormat":
        """From what is in config.json, processor_config.json and preprocessor_config.json."""
        return cls(tokenizer)

    def frame(self, text: str, has_images: bool = True) -> str:
        """A text with one image token an image -> the same with what the family puts around it."""
        return text

    def following(self, text: str) -> str:
        """What stands for a later question of a conversation, where there is no chat template."""
        return text

    def prompt(
        self, text: str, images: Sequence[Any] = (), add_special_tokens: bool = True
    ) -> Prompt:
        """A text and its images -> a prompt.

        Args:
          text: with the family's image token in the place of every image, but see the families.
          images: what counts of each, which is the family's.
          add_special_tokens: whether the tokenizer puts its own around the text; a chat template wrote them already.

        Raises:
          CheckpointError: the image tokens in the text are not as many as the images, or the tokenizer has none.
        """
        return Prompt(_ids(self.tokenizer.encode(text, add_special_tokens)))


@dataclass(frozen=True)
class LlavaFormat(TextFormat):
    """Of every image: (height, width) of its pixels."""

    patch_size_px: int
    tokens_beside_patches: int  # such as the class token
    image_token: str

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        token = (
            tokenizer.special_tokens.get("image_token") or processor.get("image_token") or "<image>"
        )
        if not isinstance(token, str):
            raise CheckpointError(f"{PROCESSOR}: image_token is {token!r}, but has to be text.")
        patch_size, beside = (
            processor.get("patch_size"),
            processor.get("num_additional_image_tokens", 0),
        )
        strategy = processor.get("vision_feature_select_strategy")
        if patch_size is None:  # older folders leave it to the model's config
            vision = config["vision_config"]
            patch_size, beside = (
                vision["patch_size"],
                int(vision.get("model_type") == "clip_vision_model"),
            )
            strategy = config.get("vision_feature_select_strategy", "default")
        if not all_nonnegative_ints(patch_size, beside) or patch_size == 0 or beside > MOST_BESIDE:
            raise TypeError("patch_size is no number of pixels")
        return cls(tokenizer, patch_size, beside - (strategy == "default"), token)

    def prompt(self, text, images=(), add_special_tokens=True):
        _check_count(text, self.image_token, len(images))
        self.tokenizer.id_of(self.image_token)
        counts = [
            height // self.patch_size_px * (width // self.patch_size_px) for height, width in images
        ]
        tokens = [self.image_token * (count + self.tokens_beside_patches) for count in counts]
        parts = itertools.zip_longest(text.split(self.image_token), tokens, fillvalue="")
        return super().prompt(
            "".join(itertools.chain(*parts)), add_special_tokens=add_special_tokens
        )


@dataclass(frozen=True)
class PaliGemmaFormat(TextFormat):
    """Nothing counts of an image; a text without image tokens gets them at its start. Special tokens are its own."""

    tokens_per_image: int
    image_token: str = "<image>"
    takes_bos = False
    has_own_form = True

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        count = images.get("image_seq_length")
        if count is None:
            vision = config["vision_config"]
            count = (vision["image_size"] // vision["patch_size"]) ** 2
        if not all_nonnegative_ints(count):
            raise TypeError("image_seq_length is no number of tokens")
        return cls(tokenizer, count)

    def prompt(self, text, images=(), add_special_tokens=True):
        if self.image_token not in text:
            text = self.image_token * len(images) + text
        _check_count(text, self.image_token, len(images))
        self.tokenizer.id_of(self.image_token)
        framed = self.frame(text).replace(
            self.image_token, self.image_token * self.tokens_per_image
        )
        ids = _ids(self.tokenizer.encode(framed, add_special_tokens=False))
        return Prompt(ids, token_type_ids=np.zeros_like(ids))

    def frame(self, text, has_images=True):
        before, last, question = text.rpartition(self.image_token)
        return f"{before}{last}{self.tokenizer.special_tokens.get('bos_token', '')}{self.following(question)}"

    def following(self, text):
        return f"{text}\n"


@dataclass(frozen=True)
class FuyuFormat(TextFormat):
    """Of the image, of which there is one at the most: (rows, columns) of its patches. The text does not mention it."""

    patch_token: str = "|SPEAKER|"
    has_own_form = True

    def frame(self, text, has_images=True):
        return (
            f"<s>{text}<0x04>" if has_images else text
        )  # this byte begins an answer about an image

    def following(self, text):
        return text + "\n"

    def prompt(self, text, images=(), add_special_tokens=True):
        if not images:
            return super().prompt(text, add_special_tokens=add_special_tokens)
        if len(images) > 1:
            raise CheckpointError(
                f"there are {len(images)} images, but Fuyu reads one at the most."
            )
        _check_count(self.patch_token + text, self.patch_token, 1)
        patch, newline = map(self.tokenizer.id_of, (self.patch_token, "|NEWLINE|"))
        ((rows, columns),) = images
        question = self.tokenizer.encode(self.frame(text), add_special_tokens=False)
        return Prompt(_ids([*([patch] * columns + [newline]) * rows, *question]))


@dataclass(frozen=True)
class MllamaFormat(TextFormat):
    """Of every image: the number of its tiles."""

    max_tiles: int
    image_token: str = "<|image|>"
    has_own_form = True

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        token = tokenizer.special_tokens.get("image_token") or cls.image_token
        return cls(tokenizer, images.get("max_image_tiles") or 4, token)

    def prompt(self, text, images=(), add_special_tokens=True):
        _check_count(text, self.image_token, len(images))
        ids = _ids(self.tokenizer.encode(self.frame(text), add_special_tokens))
        if not images:
            return Prompt(ids)
        return Prompt(
            ids,
            cross_attention_mask=self._mask(ids == self.tokenizer.id_of(self.image_token), images),
        )

    def frame(self, text, has_images=True):
        """bos behind the image tokens at the start, unless the text has one."""
        bos = self.tokenizer.special_tokens.get("bos_token", "")
        if bos in text:
            return text
        question = text
        while question.startswith(self.image_token):
            question = question.removeprefix(self.image_token)
        return text[: len(text) - len(question)] + bos + question

    def _mask(self, is_image: np.ndarray, num_tiles: Sequence[int]) -> np.ndarray:
        """Tokens read the last image before them, and with it those that stand right before it.

        tokens      A  B  the  C  cat
        image A     x  x  x    .  .
        image B     .  x  x    .  .
        image C     .  .  .    x  x
        """
        mask = np.zeros((len(is_image), len(num_tiles), self.max_tiles), np.int32)
        starts = np.flatnonzero(is_image)
        ends = np.append(starts[1:], len(is_image))
        for image in reversed(range(len(starts))):
            if image + 1 < len(starts) and ends[image] == starts[image] + 1:
                ends[image] = ends[image + 1]
            mask[starts[image] : ends[image], image, : num_tiles[image]] = 1
        return mask


@dataclass(frozen=True)
class EncoderDecoderFormat(TextFormat):
    """The text follows a token that starts the decoder; the image leaves no trace in it."""

    takes_bos = False
    has_own_form = True


FORMATS = {
    "llava": LlavaFormat,
    "paligemma": PaliGemmaFormat,
    "fuyu": FuyuFormat,
    "mllama": MllamaFormat,
    "vision-encoder-decoder": EncoderDecoderFormat,
}


def check_answers(answers: Sequence[str], prompts: Sequence[str]) -> None:
    """Raises CheckpointError if there is not one answer for each prompt."""
    if isinstance(answers, str) or len(answers) != len(prompts):
        raise CheckpointError(
            f"answers must be a list of {len(prompts)} texts, one for each prompt."
        )


def has_own_form(folder: str | os.PathLike) -> bool:
    """Whether the family in a folder writes prompts in a form of its own, without a chat template."""
    config = read_json(Path(folder).expanduser() / CONFIG)
    return FORMATS.get(config.get("model_type"), TextFormat).has_own_form


def load_prompt_format(folder: str | os.PathLike, tokenizer: HubTokenizer) -> TextFormat:
    """How the checkpoint in a folder wants prompts.

    Raises:
      CheckpointError: there is no config.json, a file is damaged, or none says how many tokens an image takes.
    """
    folder = Path(folder).expanduser()
    config, processor = read_json(folder / CONFIG), read_if_there(folder / PROCESSOR)
    images = processor.get("image_processor") or read_if_there(folder / PREPROCESSOR)
    try:
        return FORMATS.get(config.get("model_type"), TextFormat).read(
            tokenizer, config, processor, images
        )
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        path = folder / PROCESSOR
        raise CheckpointError(
            f"{path} does not say how many tokens an image takes, nor does a file beside it."
        ) from None


def stack_prompts(prompts: Sequence[Prompt], pad_id: int) -> dict[str, np.ndarray]:
    """Prompts -> a model's inputs by their names; shorter ones are padded on the left.

    Returns:
      input_ids, attention_mask and, for a family that has them, token_type_ids (B, T) int32, and cross_attention_mask
      (B, T, I, J) int32.
    """
    length = max(len(prompt.input_ids) for prompt in prompts)
    ids, there = (np.full((len(prompts), length), fill, np.int32) for fill in (pad_id, 0))
    masks = [
        prompt.cross_attention_mask for prompt in prompts if prompt.cross_attention_mask is not None
    ]
    most = np.max([mask.shape[1:] for mask in masks], axis=0, initial=0) if masks else ()
    read = np.zeros((len(prompts), length, *most), np.int32)
    types = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = length - len(prompt.input_ids)
        ids[row, start:], there[row, start:] = prompt.input_ids, 1
        if prompt.token_type_ids is not None:
            types[row, start:] = prompt.token_type_ids
        if prompt.cross_attention_mask is not None:
            read[row, start:, : prompt.cross_attention_mask.shape[1]] = prompt.cross_attention_mask
    inputs = {"input_ids": ids, "attention_mask": there}
    if any(prompt.token_type_ids is not None for prompt in prompts):
        inputs["token_type_ids"] = types
    return inputs | ({"cross_attention_mask": read} if masks else {})


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)


def _check_count(text: str, token: str, images: int) -> None:
    found = text.count(token)
    if found != images:
        raise CheckpointError(
            f"the prompt has {found} image tokens ({token}), but there are {images} images."
        )
