"""Prompt formats without image tokens, and functions that the others share."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_jax.config import CheckpointError
from vlm_jax.hub.tensors.mapped import all_nonnegative_ints
from vlm_jax.hub.text.prompts import Prompt, to_ids
from vlm_jax.hub.text.special_tokens import TOKENIZER_CONFIG
from vlm_jax.hub.text.tokenizer import HubTokenizer

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


def count_tokens(values: Mapping, name: str, default: int, file: str = PROCESSOR) -> int:
    """Returns the number of tokens of a tile, by a key of a file.

    Raises:
      CheckpointError: it is not a positive integer.
    """
    count = values.get(name, default)
    if not all_nonnegative_ints(count) or not count:
        raise CheckpointError(f"{file}: {name} is {count!r}, but must be a number of tokens.")
    return count


def llava_image_token(tokenizer: HubTokenizer, processor: Mapping) -> str:
    """Returns the text of LLaVA's image token.

    Raises:
      CheckpointError: it is not text.
    """
    named = tokenizer.special_tokens.get("image_token")
    token = named or processor.get("image_token") or "<image>"
    if not isinstance(token, str):
        raise CheckpointError(f"{PROCESSOR}: image_token is {token!r}, but must be text.")
    return token


def named_tokens(tokenizer: HubTokenizer, *names: str) -> list[str]:
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


def fill_placeholders(text: str, token: str, images: Sequence[str]) -> str:
    """Replaces the n-th image token of a text by the n-th text of an image."""
    parts = itertools.zip_longest(text.split(token), images, fillvalue="")
    return "".join(itertools.chain(*parts))


def check_placeholders(text: str, token: str, num_images: int) -> None:
    count = text.count(token)
    if count != num_images:
        raise CheckpointError(
            f"the prompt has {count} image tokens ({token}), but there are {num_images} images."
        )
