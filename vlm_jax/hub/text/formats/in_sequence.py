"""Prompt formats with image tokens in the text, a run of them for each image."""

from dataclasses import dataclass

import numpy as np

from vlm_jax.config import CheckpointError
from vlm_jax.hub.tensors.mapped import all_nonnegative_ints
from vlm_jax.hub.text.formats.common import (
    MAX_EXTRA_TOKENS,
    PREPROCESSOR,
    PROCESSOR,
    TextFormat,
    check_placeholders,
    count_tokens,
    fill_placeholders,
    llava_image_token,
    named_tokens,
)
from vlm_jax.hub.text.formats.grids import PixtralFormat
from vlm_jax.hub.text.prompts import Prompt, to_ids
from vlm_jax.hub.text.tokenizer import NEWLINE_TOKEN
from vlm_jax.hub.text.tokenizer_files import CONFIG


@dataclass(frozen=True)
class LlavaFormat(TextFormat):
    """`images` of a prompt: (height, width) of each in pixels."""

    patch_size_px: int
    tokens_beside_patches: int  # such as the class token
    image_token: str

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        if config.get("vision_config", {}).get("model_type") == "pixtral":
            return PixtralFormat.read(tokenizer, config, processor, images)
        token = llava_image_token(tokenizer, processor)
        patch_size = processor.get("patch_size")
        extra = processor.get("num_additional_image_tokens", 0)
        strategy = processor.get("vision_feature_select_strategy")
        # Older folders state it only in the model's config.
        if patch_size is None:
            vision = config["vision_config"]
            patch_size = vision["patch_size"]
            extra = int(vision.get("model_type") == "clip_vision_model")
            strategy = config.get("vision_feature_select_strategy", "default")
        is_valid = all_nonnegative_ints(patch_size, extra) and patch_size > 0
        if not is_valid or extra > MAX_EXTRA_TOKENS:
            raise TypeError("patch_size is not a number of pixels")
        # The strategy "default" drops the class token.
        return cls(tokenizer, patch_size, extra - (strategy == "default"), token)

    def prompt(self, text, images=(), add_special_tokens=True):
        check_placeholders(text, self.image_token, len(images))
        self.tokenizer.token_to_id(self.image_token)
        size = self.patch_size_px
        counts = [(height // size) * (width // size) for height, width in images]
        tokens = [self.image_token * (count + self.tokens_beside_patches) for count in counts]
        filled = fill_placeholders(text, self.image_token, tokens)
        return super().prompt(filled, add_special_tokens=add_special_tokens)


@dataclass(frozen=True)
class TileMapFormat(TextFormat):
    """`images` of a prompt: number of tokens of each."""

    image_token: str

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        return cls(tokenizer, llava_image_token(tokenizer, processor))

    def prompt(self, text, images=(), add_special_tokens=True):
        check_placeholders(text, self.image_token, len(images))
        self.tokenizer.token_to_id(self.image_token)
        filled = fill_placeholders(
            text, self.image_token, [self.image_token * count for count in images]
        )
        return super().prompt(filled, add_special_tokens=add_special_tokens)


@dataclass(frozen=True)
class PaliGemmaFormat(TextFormat):
    """The sizes of images are ignored; a text without image tokens gets them at the start.

    The format writes all special tokens itself.
    """

    tokens_per_image: int
    image_token: str = "<image>"
    takes_bos = False
    has_own_format = True

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        vision = config["vision_config"]
        # SigLIP's defaults (transformers 5.23).
        rows = (vision.get("image_size") or 224) // (vision.get("patch_size") or 16)
        if not all_nonnegative_ints(rows):
            raise TypeError("image_size and patch_size are not numbers of pixels")
        count = images.get("image_seq_length")
        if count not in (None, rows**2):
            file = PROCESSOR if processor.get("image_processor") else PREPROCESSOR
            raise CheckpointError(
                f"{file}: image_seq_length is {count!r}, but the model encodes an image as "
                f"{rows**2} tokens."
            )
        return cls(tokenizer, rows**2)

    def prompt(self, text, images=(), add_special_tokens=True):
        if self.image_token not in text:
            text = self.image_token * len(images) + text
        check_placeholders(text, self.image_token, len(images))
        self.tokenizer.token_to_id(self.image_token)
        framed = self.frame(text).replace(
            self.image_token, self.image_token * self.tokens_per_image
        )
        ids = to_ids(self.tokenizer.encode(framed, add_special_tokens=False))
        return Prompt(ids, token_type_ids=np.zeros_like(ids), answer_type=1)

    def frame(self, text, has_images=True):
        before, last, question = text.rpartition(self.image_token)
        bos = self.tokenizer.special_tokens.get("bos_token", "")
        return f"{before}{last}{bos}{self.follow_up(question)}"

    def follow_up(self, text):
        return f"{text}\n"


@dataclass(frozen=True)
class Blip2Format(TextFormat):
    """The sizes of images are ignored; a text without image tokens gets them at the start.

    The format writes all special tokens itself.
    """

    tokens_per_image: int
    image_token: str
    takes_bos = False
    has_own_format = True

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        count = count_tokens(config, "num_query_tokens", 32, file=CONFIG)
        # The processor adds an image token unless there is one.
        return cls(tokenizer, count, tokenizer.id_to_token(tokenizer.add_image_token()))

    def prompt(self, text, images=(), add_special_tokens=True):
        if self.image_token not in text:
            text = self.image_token * len(images) + text
        check_placeholders(text, self.image_token, len(images))
        tokens = self.image_token * self.tokens_per_image
        framed = self.frame(text).replace(self.image_token, tokens)
        return Prompt(to_ids(self.tokenizer.encode(framed, add_special_tokens=False)))

    def frame(self, text, has_images=True):
        before, last, question = text.rpartition(self.image_token)
        bos_id = self.tokenizer.bos_id
        adds_bos = bos_id is not None and self.tokenizer.encode("a")[:1] == [bos_id]
        bos = self.tokenizer.id_to_token(bos_id) if adds_bos else ""
        return f"{before}{last}{bos}{question}"


@dataclass(frozen=True)
class Gemma3Format(TextFormat):
    """The sizes of images are ignored: each has the same number of tokens."""

    tokens_per_image: int
    soft_token: str
    end_token: str
    image_token: str
    has_own_format = True

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        # The defaults of Gemma3Config and Gemma3Processor (transformers 5.23).
        model_count = config.get("mm_tokens_per_image") or 256
        count = processor.get("image_seq_length", 256)
        if count != model_count:
            raise CheckpointError(
                f"{PROCESSOR}: image_seq_length is {count!r}, but the model encodes an image as "
                f"{model_count} tokens."
            )
        return cls(
            tokenizer, count, *named_tokens(tokenizer, "image_token", "eoi_token", "boi_token")
        )

    @property
    def slot_token(self):
        return self.soft_token

    def expand(self, text):
        return self._with_images(text, self.soft_token)

    def prompt(self, text, images=(), add_special_tokens=True):
        check_placeholders(text, self.image_token, len(images))
        soft_id = self.tokenizer.token_to_id(self.soft_token)
        expanded = self._with_images(text, self.soft_token * self.tokens_per_image)
        ids = to_ids(self.tokenizer.encode(expanded, add_special_tokens))
        return Prompt(ids, token_type_ids=(ids == soft_id).astype(np.int32))

    def _with_images(self, text: str, tokens: str) -> str:
        image = f"\n\n{self.image_token}{tokens}{self.end_token}\n\n"
        return text.replace(self.image_token, image)


@dataclass(frozen=True)
class FuyuFormat(TextFormat):
    """`images` of a prompt: (rows, columns) of patches of at most one image.

    The text has no placeholder for it.
    """

    patch_token: str = "|SPEAKER|"
    has_own_format = True

    def frame(self, text, has_images=True):
        # The byte 0x04 starts an answer about an image.
        return f"<s>{text}<0x04>" if has_images else text

    def follow_up(self, text):
        return text + "\n"

    def prompt(self, text, images=(), add_special_tokens=True):
        if not images:
            return super().prompt(text, add_special_tokens=add_special_tokens)
        if len(images) > 1:
            raise CheckpointError(f"the prompt has {len(images)} images: Fuyu takes at most one.")
        check_placeholders(self.patch_token + text, self.patch_token, 1)
        patch, newline = map(self.tokenizer.token_to_id, (self.patch_token, NEWLINE_TOKEN))
        ((rows, columns),) = images
        question = self.tokenizer.encode(self.frame(text), add_special_tokens=False)
        return Prompt(to_ids([*([patch] * columns + [newline]) * rows, *question]))
