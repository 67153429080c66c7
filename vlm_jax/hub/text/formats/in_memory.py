"""Prompt formats of models that read images by cross-attention."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_jax.hub.text.formats.common import TextFormat, check_placeholders
from vlm_jax.hub.text.prompts import Prompt, to_ids


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
        check_placeholders(text, self.image_token, len(images))
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
class IdeficsFormat(TextFormat):
    """The sizes of images are ignored. Images one after another share the token between them.

    The format writes all special tokens itself.
    """

    image_token: str = "<image>"
    fake_token: str = "<fake_token_around_image>"
    takes_bos = False
    has_own_format = True

    def expand(self, text):
        image = f"{self.fake_token}{self.image_token}{self.fake_token}"
        # As in transformers, where images lie between texts.
        texts = [piece.strip(" ") for piece in text.split(self.image_token)]
        return image.join(texts).replace(self.fake_token * 2, self.fake_token)

    def frame(self, text, has_images=True):
        bos = self.tokenizer.special_tokens.get("bos_token", "")
        return text if bos and text.startswith(bos) else bos + text

    def prompt(self, text, images=(), add_special_tokens=True):
        check_placeholders(text, self.image_token, len(images))
        framed = self.frame(self.expand(text))
        ids = to_ids(self.tokenizer.encode(framed, add_special_tokens=False))
        if not images:
            return Prompt(ids)
        is_image = ids == self.tokenizer.token_to_id(self.image_token)
        return Prompt(ids, image_attention_mask=self._mask(ids, is_image))

    def _mask(self, ids: np.ndarray, is_image: np.ndarray) -> np.ndarray:
        """Tokens attend to the last image before them, in the text that an end of text closes.

        x: attends.
        tokens      the  A  cat  B  </s>  end
        image A      .   x   x   .    .    .
        image B      .   .   .   x    x    .
        """
        eos = self.tokenizer.special_tokens.get("eos_token")
        is_end = np.zeros_like(is_image)
        if eos is not None:
            is_end = ids == self.tokenizer.token_to_id(eos)
        ends_before = np.cumsum(is_end) - is_end
        ends_before_image = np.maximum.accumulate(np.where(is_image, ends_before, 0))
        is_open = ends_before == ends_before_image
        last_image = np.cumsum(is_image) - 1
        mask = (last_image[:, None] == np.arange(is_image.sum())) & is_open[:, None]
        return mask.astype(np.int32)


@dataclass(frozen=True)
class EncoderDecoderFormat(TextFormat):
    """The text follows the decoder's start token; the text does not mention the image."""

    takes_bos = False
    has_own_format = True
