"""Prompts with images, as written by transformers 5.23 (`models/*/processing_*.py`).

llava      <s> USER: <image> <image> <image> <image> what is it? ASSISTANT:
           N tokens for every <image> of the text
llava_next the same, with a number of tokens for each image of its own
paligemma  <image> <image> <image> <image> <bos> what is it? \\n
           N tokens for every image, at the start unless the text has placeholders
gemma3     <bos> \\n\\n <start_of_image> N x <image_soft_token> <end_of_image> \\n\\n what is it?
           <start_of_image> in the text marks an image
idefics3   <fake_token_around_image> <global-img> N x <image> <fake_token_around_image> what is it?
           N tokens for every tile, <row_1_col_1> and so on, then for the whole image, <global-img>
internvl   <img> N x <IMG_CONTEXT> </img> what is it?
           N tokens for every tile, then for the whole image
qwen2_vl   <|vision_start|> N x <|image_pad|> <|vision_end|> what is it?
           N tokens for every image, a square of its patches each
mistral3   [IMG] [IMG] [IMG_BREAK] [IMG] [IMG] [IMG_END] what is it?
           one token per square of patches, one per row of them; llava with Pixtral's encoder alike
fuyu       |SPEAKER| |SPEAKER| |NEWLINE| |SPEAKER| |SPEAKER| |NEWLINE| <s> what is it? <0x04>
           one token per patch, one per row of patches
mllama     <|image|> <|begin_of_text|> what is it?
           one token per image, and a cross-attention mask
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
from vlm_jax.hub.text.prompts import Prompt, to_ids
from vlm_jax.hub.text.special_tokens import TOKENIZER_CONFIG, read_json_if_exists
from vlm_jax.hub.text.tokenizer import NEWLINE_TOKEN, HubTokenizer
from vlm_jax.hub.text.tokenizer_files import CONFIG

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
MAX_EXTRA_TOKENS = 1024  # tokens of an image beside its patches


@dataclass(frozen=True)
class TextFormat:
    """Prompt format of a family without image tokens in the text."""

    tokenizer: HubTokenizer

    # Text of the image placeholder; "": images come before the text.
    image_token = ""
    # Whether the tokenizer may put special tokens around the text; otherwise `frame` writes them.
    takes_bos = True
    # Whether a prompt without a chat template is more than its text and its images.
    has_own_format = False

    @classmethod
    def read(
        cls, tokenizer: HubTokenizer, config: Mapping, processor: Mapping, images: Mapping
    ) -> "TextFormat":
        """Builds the format from config.json, processor_config.json, preprocessor_config.json."""
        return cls(tokenizer)

    @property
    def slot_token(self) -> str:
        """Text of the token that is repeated for the tokens of an image."""
        return self.image_token

    def expand(self, text: str) -> str:
        """Replaces each image placeholder by the text of an image, with one `slot_token`."""
        return text

    def frame(self, text: str, has_images: bool = True) -> str:
        """Adds the family's own tokens around a text with one placeholder per image."""
        return text

    def follow_up(self, text: str) -> str:
        """Text of a later question of a conversation without a chat template."""
        return text

    def prompt(
        self, text: str, images: Sequence[Any] = (), add_special_tokens: bool = True
    ) -> Prompt:
        """Returns the prompt of a text and its images.

        Args:
          text: with the family's image token for every image; see the families for exceptions.
          images: one size per image, in the unit of the family.
          add_special_tokens: the tokenizer puts its special tokens around the text; a chat template
            has already written them.

        Raises:
          CheckpointError: the text has more or fewer image tokens than images, or the tokenizer has
            no image token.
        """
        return Prompt(to_ids(self.tokenizer.encode(text, add_special_tokens)))


@dataclass(frozen=True)
class PlaceholderFormat(TextFormat):
    """Prompt format of a text decoder that was combined with an encoder for images.

    `tokenizer` has one token for the placeholder.
    """

    image_token: str

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        # Adds an image token unless there is one.
        image_id = tokenizer.add_image_token()
        return cls(tokenizer, tokenizer.id_to_token(image_id))


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
        token = _image_token(tokenizer, processor)
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
        _check_count(text, self.image_token, len(images))
        self.tokenizer.token_to_id(self.image_token)
        size = self.patch_size_px
        counts = [(height // size) * (width // size) for height, width in images]
        tokens = [self.image_token * (count + self.tokens_beside_patches) for count in counts]
        filled = _fill(text, self.image_token, tokens)
        return super().prompt(filled, add_special_tokens=add_special_tokens)


@dataclass(frozen=True)
class TileMapFormat(TextFormat):
    """`images` of a prompt: number of tokens of each."""

    image_token: str

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        return cls(tokenizer, _image_token(tokenizer, processor))

    def prompt(self, text, images=(), add_special_tokens=True):
        _check_count(text, self.image_token, len(images))
        self.tokenizer.token_to_id(self.image_token)
        filled = _fill(text, self.image_token, [self.image_token * count for count in images])
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
        _check_count(text, self.image_token, len(images))
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
        return cls(tokenizer, count, *_tokens(tokenizer, "image_token", "eoi_token", "boi_token"))

    @property
    def slot_token(self):
        return self.soft_token

    def expand(self, text):
        return self._with_images(text, self.soft_token)

    def prompt(self, text, images=(), add_special_tokens=True):
        _check_count(text, self.image_token, len(images))
        soft_id = self.tokenizer.token_to_id(self.soft_token)
        expanded = self._with_images(text, self.soft_token * self.tokens_per_image)
        ids = to_ids(self.tokenizer.encode(expanded, add_special_tokens))
        return Prompt(ids, token_type_ids=(ids == soft_id).astype(np.int32))

    def _with_images(self, text: str, tokens: str) -> str:
        image = f"\n\n{self.image_token}{tokens}{self.end_token}\n\n"
        return text.replace(self.image_token, image)


@dataclass(frozen=True)
class Idefics3Format(TextFormat):
    """`images` of a prompt: (rows, columns) of tiles of each."""

    tokens_per_tile: int
    fake_token: str  # before every tile and after the last
    global_token: str  # names the tile with the whole image
    image_token: str
    has_own_format = True

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        named = tokenizer.special_tokens
        return cls(
            tokenizer,
            _token_count(processor, "image_seq_len", 169),
            named.get("fake_image_token", "<fake_token_around_image>"),
            named.get("global_image_token", "<global-img>"),
            named.get("image_token", "<image>"),
        )

    def expand(self, text):
        return text.replace(self.image_token, self._image((1, 1), self.image_token))

    def prompt(self, text, images=(), add_special_tokens=True):
        _check_count(text, self.image_token, len(images))
        for token in (self.image_token, self.fake_token):
            self.tokenizer.token_to_id(token)
        tile = self.image_token * self.tokens_per_tile
        texts = [self._image(grid, tile) for grid in images]
        filled = _fill(text, self.image_token, texts)
        return super().prompt(filled, add_special_tokens=add_special_tokens)

    def _image(self, grid: tuple[int, int], tile: str) -> str:
        """Text of an image: each tile with its name, line by line, and the whole image."""
        rows, columns = grid
        lines = []
        for row in range(rows if rows * columns > 1 else 0):
            names = [f"<row_{row + 1}_col_{column + 1}>" for column in range(columns)]
            lines.append("".join(f"{self.fake_token}{name}{tile}" for name in names) + "\n")
        # An empty line precedes the whole image.
        gap = "\n" if lines else ""
        return "".join(lines) + f"{gap}{self.fake_token}{self.global_token}{tile}{self.fake_token}"


@dataclass(frozen=True)
class InternVLFormat(TextFormat):
    """`images` of a prompt: (rows, columns) of tiles of each."""

    tokens_per_tile: int
    start_token: str
    end_token: str
    image_token: str
    has_own_format = True

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        names = ("start_image_token", "end_image_token", "context_image_token")
        count = _token_count(processor, "image_seq_length", 256)
        return cls(tokenizer, count, *_tokens(tokenizer, *names))

    def expand(self, text):
        return text.replace(self.image_token, self._image(self.image_token))

    def prompt(self, text, images=(), add_special_tokens=True):
        _check_count(text, self.image_token, len(images))
        texts = []
        for rows, columns in images:
            # An image of several tiles has the whole image as one more.
            tiles = rows * columns + (rows * columns > 1)
            texts.append(self._image(self.image_token * (tiles * self.tokens_per_tile)))
        filled = _fill(text, self.image_token, texts)
        return super().prompt(filled, add_special_tokens=add_special_tokens)

    def _image(self, tokens: str) -> str:
        return f"{self.start_token}{tokens}{self.end_token}"


@dataclass(frozen=True)
class Qwen2VLFormat(TextFormat):
    """`images` of a prompt: (rows, columns) of patches of each.

    The text of an image is `start_token` image token `end_token`; a chat template writes all three.
    """

    patches_per_token: int
    image_token: str = "<|image_pad|>"

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        token = tokenizer.special_tokens.get("image_token") or cls.image_token
        side = images.get("merge_size") or 2
        if not all_nonnegative_ints(side):
            raise TypeError("merge_size is not a number of patches")
        return cls(tokenizer, side**2, token)

    def prompt(self, text, images=(), add_special_tokens=True):
        _check_count(text, self.image_token, len(images))
        counts = [rows * columns // self.patches_per_token for rows, columns in images]
        filled = _fill(text, self.image_token, [self.image_token * count for count in counts])
        return super().prompt(filled, add_special_tokens=add_special_tokens)


@dataclass(frozen=True)
class PixtralFormat(TextFormat):
    """`images` of a prompt: (height, width) of each in pixels."""

    unit_px: int  # side of the square that is a token
    image_token: str = "[IMG]"
    break_token: str = "[IMG_BREAK]"
    end_token: str = "[IMG_END]"

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        patch, side = processor.get("patch_size", 16), processor.get("spatial_merge_size", 1)
        if not all_nonnegative_ints(patch, side) or not patch * side:
            raise TypeError("patch_size or spatial_merge_size is not a number")
        names = ("image_token", "image_break_token", "image_end_token")
        defaults = (cls.image_token, cls.break_token, cls.end_token)
        tokens = [processor.get(name) or token for name, token in zip(names, defaults)]
        return cls(tokenizer, patch * side, *tokens)

    def prompt(self, text, images=(), add_special_tokens=True):
        _check_count(text, self.image_token, len(images))
        texts = []
        for height, width in images:
            row = self.image_token * (width // self.unit_px)
            rows = [row] * (height // self.unit_px)
            texts.append(self.break_token.join(rows) + self.end_token)
        filled = _fill(text, self.image_token, texts)
        return super().prompt(filled, add_special_tokens=add_special_tokens)


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
        _check_count(self.patch_token + text, self.patch_token, 1)
        patch, newline = map(self.tokenizer.token_to_id, (self.patch_token, NEWLINE_TOKEN))
        ((rows, columns),) = images
        question = self.tokenizer.encode(self.frame(text), add_special_tokens=False)
        return Prompt(to_ids([*([patch] * columns + [newline]) * rows, *question]))


@dataclass(frozen=True)
class MllamaFormat(TextFormat):
    """`images` of a prompt: number of tiles of each."""

    max_tiles: int
    image_token: str = "<|image|>"
    has_own_format = True

    @classmethod
    def read(cls, tokenizer, config, processor, images):
        token = tokenizer.special_tokens.get("image_token") or cls.image_token
        return cls(tokenizer, images.get("max_image_tiles") or 4, token)

    def prompt(self, text, images=(), add_special_tokens=True):
        _check_count(text, self.image_token, len(images))
        ids = to_ids(self.tokenizer.encode(self.frame(text), add_special_tokens))
        if not images:
            return Prompt(ids)
        is_image = ids == self.tokenizer.token_to_id(self.image_token)
        return Prompt(ids, cross_attention_mask=self._mask(is_image, images))

    def frame(self, text, has_images=True):
        """Inserts bos after the image tokens at the start, unless the text contains bos."""
        bos = self.tokenizer.special_tokens.get("bos_token", "")
        if bos in text:
            return text
        question = text
        while question.startswith(self.image_token):
            question = question.removeprefix(self.image_token)
        return text[: len(text) - len(question)] + bos + question

    def _mask(self, is_image: np.ndarray, num_tiles: Sequence[int]) -> np.ndarray:
        """Tokens attend to the last image before them, and to images directly before that one.

        x: attends; J = 1.
        tokens      A  B  the  C  cat
        image A     x  x  x    .  .
        image B     .  x  x    .  .
        image C     .  .  .    x  x
        """
        mask = np.zeros((len(is_image), len(num_tiles), self.max_tiles), np.int32)
        # From the last image to the first: one directly followed by another takes over its range.
        starts = np.flatnonzero(is_image)
        ends = np.append(starts[1:], len(is_image))
        for image in reversed(range(len(starts))):
            if image + 1 < len(starts) and ends[image] == starts[image] + 1:
                ends[image] = ends[image + 1]
            mask[starts[image] : ends[image], image, : num_tiles[image]] = 1
        return mask


@dataclass(frozen=True)
class EncoderDecoderFormat(TextFormat):
    """The text follows the decoder's start token; the text does not mention the image."""

    takes_bos = False
    has_own_format = True


FORMATS = {
    "llava": LlavaFormat,
    "llava_next": TileMapFormat,
    "llava_onevision": TileMapFormat,
    "paligemma": PaliGemmaFormat,
    "gemma3": Gemma3Format,
    "idefics3": Idefics3Format,
    "smolvlm": Idefics3Format,
    "internvl": InternVLFormat,
    "qwen2_vl": Qwen2VLFormat,
    "qwen2_5_vl": Qwen2VLFormat,
    "qwen3_vl": Qwen2VLFormat,
    "mistral3": PixtralFormat,
    "fuyu": FuyuFormat,
    "mllama": MllamaFormat,
    "vision-encoder-decoder": EncoderDecoderFormat,
}


def has_own_format(folder: str | os.PathLike) -> bool:
    """True if the family in a folder has its own prompt format, without a chat template."""
    config = read_json(Path(folder).expanduser() / CONFIG)
    return FORMATS.get(config.get("model_type"), TextFormat).has_own_format


def load_prompt_format(
    folder: str | os.PathLike, tokenizer: HubTokenizer, has_images: bool = False
) -> TextFormat:
    """Loads the prompt format of the checkpoint in a folder.

    Args:
      has_images: the model takes images; a text decoder then gets an image placeholder.

    Raises:
      CheckpointError: config.json is missing, a file is damaged, or no file states the number of
        tokens of an image.
    """
    folder = Path(folder).expanduser()
    config, processor = read_json(folder / CONFIG), read_json_if_exists(folder / PROCESSOR)
    images = processor.get("image_processor") or read_json_if_exists(folder / PREPROCESSOR)
    default = PlaceholderFormat if has_images else TextFormat
    text_format = FORMATS.get(config.get("model_type"), default)
    try:
        return text_format.read(tokenizer, config, processor, images)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise CheckpointError(
            f"neither {folder / PROCESSOR} nor a file beside it states how many tokens an image "
            "takes."
        ) from None


def _token_count(processor: Mapping, name: str, default: int) -> int:
    """Returns the number of tokens of a tile.

    Raises:
      CheckpointError: it is not a positive integer.
    """
    count = processor.get(name, default)
    if not all_nonnegative_ints(count) or not count:
        raise CheckpointError(f"{PROCESSOR}: {name} is {count!r}, but must be a number of tokens.")
    return count


def _image_token(tokenizer: HubTokenizer, processor: Mapping) -> str:
    """Returns the text of LLaVA's image token.

    Raises:
      CheckpointError: it is not text.
    """
    named = tokenizer.special_tokens.get("image_token")
    token = named or processor.get("image_token") or "<image>"
    if not isinstance(token, str):
        raise CheckpointError(f"{PROCESSOR}: image_token is {token!r}, but must be text.")
    return token


def _tokens(tokenizer: HubTokenizer, *names: str) -> list[str]:
    """Returns the texts of named special tokens.

    Raises:
      CheckpointError: the tokenizer does not name one of them.
    """
    missing = [name for name in names if name not in tokenizer.special_tokens]
    if missing:
        raise CheckpointError(
            f"{TOKENIZER_CONFIG}: {missing[0]} is missing, but the text of an image has it."
        )
    return [tokenizer.special_tokens[name] for name in names]


def _fill(text: str, token: str, images: Sequence[str]) -> str:
    """Replaces the n-th image token of a text by the n-th text of an image."""
    parts = itertools.zip_longest(text.split(token), images, fillvalue="")
    return "".join(itertools.chain(*parts))


def _check_count(text: str, token: str, num_images: int) -> None:
    count = text.count(token)
    if count != num_images:
        raise CheckpointError(
            f"the prompt has {count} image tokens ({token}), but there are {num_images} images."
        )
