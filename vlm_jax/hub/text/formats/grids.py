"""Prompt formats with image tokens by tile or by row of patches."""

from dataclasses import dataclass

from vlm_jax.hub.tensors.mapped import all_nonnegative_ints
from vlm_jax.hub.text.formats.common import (
    TextFormat,
    check_placeholders,
    count_tokens,
    fill_placeholders,
    named_tokens,
)
from vlm_jax.hub.text.tokenizer import BREAK_TOKEN


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
            count_tokens(processor, "image_seq_len", 169),
            named.get("fake_image_token", "<fake_token_around_image>"),
            named.get("global_image_token", "<global-img>"),
            named.get("image_token", "<image>"),
        )

    def expand(self, text):
        return text.replace(self.image_token, self._image((1, 1), self.image_token))

    def prompt(self, text, images=(), add_special_tokens=True):
        check_placeholders(text, self.image_token, len(images))
        for token in (self.image_token, self.fake_token):
            self.tokenizer.token_to_id(token)
        tile = self.image_token * self.tokens_per_tile
        texts = [self._image(grid, tile) for grid in images]
        filled = fill_placeholders(text, self.image_token, texts)
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
        count = count_tokens(processor, "image_seq_length", 256)
        return cls(tokenizer, count, *named_tokens(tokenizer, *names))

    def expand(self, text):
        return text.replace(self.image_token, self._image(self.image_token))

    def prompt(self, text, images=(), add_special_tokens=True):
        check_placeholders(text, self.image_token, len(images))
        texts = []
        for rows, columns in images:
            # An image of several tiles has the whole image as one more.
            tiles = rows * columns + (rows * columns > 1)
            texts.append(self._image(self.image_token * (tiles * self.tokens_per_tile)))
        filled = fill_placeholders(text, self.image_token, texts)
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
        check_placeholders(text, self.image_token, len(images))
        counts = [rows * columns // self.patches_per_token for rows, columns in images]
        filled = fill_placeholders(
            text, self.image_token, [self.image_token * count for count in counts]
        )
        return super().prompt(filled, add_special_tokens=add_special_tokens)


@dataclass(frozen=True)
class PixtralFormat(TextFormat):
    """`images` of a prompt: (height, width) of each in pixels."""

    unit_px: int  # side of the square that is a token
    image_token: str = "[IMG]"
    break_token: str = BREAK_TOKEN
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

    def expand(self, text):
        # Training adds the tokens between rows together with the image tokens.
        return text.replace(self.image_token, self.image_token + self.end_token)

    def prompt(self, text, images=(), add_special_tokens=True):
        check_placeholders(text, self.image_token, len(images))
        texts = []
        for height, width in images:
            row = self.image_token * (width // self.unit_px)
            rows = [row] * (height // self.unit_px)
            texts.append(self.break_token.join(rows) + self.end_token)
        filled = fill_placeholders(text, self.image_token, texts)
        return super().prompt(filled, add_special_tokens=add_special_tokens)
