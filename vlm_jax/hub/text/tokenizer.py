"""Tokenizers of checkpoint folders; ids are equal to those of transformers 5.23's AutoTokenizer."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from vlm_jax.config import CheckpointError
from vlm_jax.hub.tensors.folder import existing_folder
from vlm_jax.hub.text.special_tokens import TOKENIZER, TOKENIZER_CONFIG, read_json_if_exists
from vlm_jax.hub.text.tokenizer_files import (
    CONFIG,
    SENTENCEPIECE,
    VOCAB,
    read_pipeline,
)

GENERATION_CONFIG = "generation_config.json"
REPLACEMENT_CHAR = "\ufffd"  # decoded from bytes that are not, or not yet, a character
# `clean_up_tokenization_spaces` removes the spaces of these.
SPACED_PUNCTUATION = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
# Image tokens of published families; a run that needs one adds the first.
IMAGE_TOKENS = ("<image>", "<|image|>")
NEWLINE_TOKEN = "|NEWLINE|"  # Fuyu
BREAK_TOKEN = "[IMG_BREAK]"  # Pixtral


class HubTokenizer:
    """The tokenizer of a checkpoint.

    Attributes:
      special_tokens: "bos_token" -> its text, for every named token; available to chat templates.
      bos_id, pad_id: None if no file names one.
      eos_ids: tokens that end an answer; empty if no file names one.
      cleans_up_spaces: `decode` removes spaces before punctuation.
    """

    def __init__(
        self,
        backend: Tokenizer,
        special_tokens: dict[str, str],
        stated_ids: Mapping[str, Any],
        end_of_word: str = "",
        cleans_up_spaces: bool = False,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._end_of_word = end_of_word
        self.cleans_up_spaces = cleans_up_spaces
        self.special_tokens = special_tokens
        bos = backend.token_to_id(special_tokens.get("bos_token", ""))
        eos = backend.token_to_id(special_tokens.get("eos_token", ""))
        pad = backend.token_to_id(special_tokens.get("pad_token", ""))
        self.bos_id = stated_ids.get("bos_token_id") if bos is None else bos
        self.pad_id = stated_ids.get("pad_token_id") if pad is None else pad
        self.eos_ids = to_tuple(stated_ids.get("eos_token_id")) or to_tuple(eos)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "HubTokenizer":
        """Reads `tokenizer.json`, `vocab.json` with `merges.txt`, or `tokenizer.model`.

        eos comes from `generation_config.json`, else `config.json`, else the tokenizer; bos and pad
        come from the tokenizer first.

        Raises:
          CheckpointError: the folder does not exist or has no tokenizer, or a file is damaged or
            does not match the others.
        """
        folder = existing_folder(folder)
        backend, special, tokenizer_class = read_pipeline(folder)
        settings = read_json_if_exists(folder / TOKENIZER_CONFIG)
        # transformers ignores the setting for BPE: every space in its tokens is one of the text.
        is_bpe = type(backend.model).__name__ == "BPE"
        cleans_up_spaces = bool(settings.get("clean_up_tokenization_spaces")) and not is_bpe
        end_of_word = tokenizer_class.end_of_word if tokenizer_class else ""
        stated = stated_ids(folder, read_json_if_exists(folder / CONFIG))
        return cls(backend, special.texts, stated, end_of_word, cleans_up_spaces)

    @property
    def backend(self) -> Tokenizer:
        """The pipeline of the `tokenizers` library, for a run that saves its own copy."""
        return self._backend

    @property
    def image_id(self) -> int | None:
        """Id of the image placeholder; None if the tokenizer has none."""
        named = self.special_tokens.get("image_token")
        names = (named, *IMAGE_TOKENS) if named else IMAGE_TOKENS
        ids = map(self._backend.token_to_id, names)
        return next((i for i in ids if i is not None), None)

    def add_image_token(self) -> int:
        """Adds an image placeholder unless there is one; returns its id."""
        return add_image_token(self._backend) if self.image_id is None else self.image_id

    @property
    def newline_id(self) -> int | None:
        """Id of the token after a row of image tokens, a line end if the tokenizer has none."""
        for name in (NEWLINE_TOKEN, BREAK_TOKEN):
            newline = self._backend.token_to_id(name)
            if newline is not None:
                return newline
        return next(iter(self.encode("\n", False)[-1:]), None)

    @property
    def next_id(self) -> int:
        """The id that the next added token will get."""
        return max(self._backend.get_vocab().values(), default=-1) + 1

    def __len__(self) -> int:
        """Number of tokens, added ones included; the model's embedding may have more rows."""
        return self._backend.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text.

        As in transformers, special tokens spelled out in the text (`<s>`) become their ids, unless
        tokenizer_config.json sets `split_special_tokens`.

        Args:
          add_special_tokens: put the tokenizer's special tokens around the text.

        Raises:
          CheckpointError: the text is not valid Unicode.
        """
        return self._encoding(text, add_special_tokens).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns ids without special tokens around them, and (start, end) characters of each.

        Raises:
          CheckpointError: the text is not valid Unicode.
        """
        encoding = self._encoding(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _encoding(self, text: str, add_special_tokens: bool) -> Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (
            TypeError
        ):  # half a surrogate pair, which Python decodes from bytes that are not UTF-8
            raise CheckpointError("the text is not valid Unicode.") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids; ids without a token are skipped."""
        text = self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        if self._end_of_word:
            text = text.replace(self._end_of_word, " ").strip()
        if self.cleans_up_spaces:
            for spaced in SPACED_PUNCTUATION:
                text = text.replace(spaced, spaced.strip())
        return text

    def token_to_id(self, token: str) -> int:
        """Returns the id of a token. Raises CheckpointError if there is no such token."""
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"the tokenizer has no token {token!r}.")
        return token_id

    def id_to_token(self, token_id: int) -> str:
        """Returns the text of a token, special ones included; "" if there is no such id."""
        return self._backend.id_to_token(token_id) or ""

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """Returns a decoder that takes ids as they are generated."""
        decode = functools.partial(self.decode, skip_special_tokens=skip_special_tokens)
        # Two more words may still remove a space: "do n ' t" becomes "don't".
        return TextStream(decode, withheld_words=2 if self.cleans_up_spaces else 0)


def add_image_token(backend: Tokenizer) -> int:
    """Adds an image placeholder to a pipeline; returns its id."""
    backend.add_special_tokens([AddedToken(IMAGE_TOKENS[0], normalized=False, special=True)])
    return backend.token_to_id(IMAGE_TOKENS[0])


class TextStream:
    """Incremental decoding; a character is returned when its last byte has been decoded.

    Args:
      decode: ids of a whole text -> the text.
      withheld_words: number of last words that more ids may still change.
    """

    def __init__(self, decode: Callable[[list[int]], str], withheld_words: int = 0):
        self._decode = decode
        self._withheld_words = withheld_words
        self._ids: list[int] = []
        self._num_returned = 0  # characters

    def feed(self, ids: Iterable[int]) -> str:
        """Returns the text that these ids complete; "" while a character is incomplete."""
        self._ids.extend(int(i) for i in ids)
        # Decodes all ids again: the text of a token depends on those before it, such as the space
        # that is dropped at the start.
        text = self._decode(self._ids).rstrip(REPLACEMENT_CHAR)
        if self._withheld_words:
            text = text.rsplit(" ", self._withheld_words)[0]
        return self._new_part(text)

    def end(self) -> str:
        """Returns the rest, when no more ids follow."""
        return self._new_part(self._decode(self._ids))

    def _new_part(self, text: str) -> str:
        new = text[self._num_returned :]
        self._num_returned = max(self._num_returned, len(text))
        return new


def stated_ids(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all keys `..._token_id`: generation_config.json, else `config`, else its text part.

    Raises:
      CheckpointError: eos_token_id is neither an id nor a list of ids.
    """
    # Later ones take precedence.
    sources = [
        config.get("decoder"),
        config.get("text_config"),
        config,
        read_json_if_exists(folder / GENERATION_CONFIG),
    ]
    stated = {}
    for source in (source for source in sources if isinstance(source, dict)):
        stated |= {
            key: value
            for key, value in source.items()
            if key.endswith("_token_id") and value is not None
        }
    eos = stated.get("eos_token_id")
    if not are_ids(*to_tuple(eos)):
        raise CheckpointError(
            f"{folder}: eos_token_id is {eos!r}, but must be an id or a list of ids."
        )
    return stated


def to_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    """Tuple of token ids from one id, a list of ids or None."""
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def are_ids(*values) -> bool:
    """True if all values are valid token ids."""
    return all(type(value) is int and 0 <= value < 2**31 for value in values)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (TOKENIZER, VOCAB, *SENTENCEPIECE))
