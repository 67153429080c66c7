"""Tokenizer: trained here on the texts of a dataset, or read from a file."""

import functools
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from vlm_jax.config import ConfigError
from vlm_jax.runtime.workdir import write_atomic

SPECIALS = ("<pad>", "<image>", "<newline>", "<eos>")
PAD, IMAGE, NEWLINE, EOS = SPECIAL_IDS = tuple(range(4))  # of a tokenizer that is trained here
SPACE_MARKS = ("\u2581", "\u0120")  # begin a token after a space: SentencePiece, byte-level BPE
# Replaces the characters of a placeholder: a noncharacter of Unicode, which no text has.
STAND_IN = "\ufdd0"


class Tokenizer:
    """Byte-level BPE (Radford et al. 2019, GPT-2): any text decodes to the same bytes."""

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        special_ids: tuple[int, ...] = SPECIAL_IDS,
        dialogue: Any = None,
    ):
        """Wraps a tokenizer.

        Args:
          bpe: the tokenizer.
          special_ids: ids of padding, image, newline and end of text.
          dialogue: the `hub.text.dialogue.Dialogue` of a run whose data.template is checkpoint.

        Raises:
          ConfigError: the tokenizer has other special ids.
        """
        if special_ids == SPECIAL_IDS and tuple(map(bpe.token_to_id, SPECIALS)) != SPECIAL_IDS:
            raise ConfigError(
                f"a tokenizer needs the tokens {' '.join(SPECIALS)} with the ids 0 to 3."
            )
        # '<eos>' in a user's text is five characters, not the end of text.
        bpe.encode_special_tokens = True
        self._bpe = bpe
        self._special_ids = special_ids
        self.dialogue = dialogue

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, tags: Sequence[str] = ()) -> "Tokenizer":
        """Learns at most `vocab_size` tokens, `tags` included; equal texts give equal tokenizers.

        Raises:
          ConfigError: `vocab_size` is smaller than the bytes and special tokens.
        """
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        specials = [*SPECIALS, *tags]
        smallest = len(alphabet) + len(specials)
        if vocab_size < smallest:
            tag_count = f", {len(tags)} tags of vision.tiles included" if tags else ""
            raise ConfigError(
                f"decoder.vocab_size {vocab_size} is too small: bytes and special tokens take "
                f"{smallest}{tag_count}."
            )
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=alphabet,
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        special_ids: tuple[int, ...] = SPECIAL_IDS,
        dialogue: Any = None,
    ) -> "Tokenizer":
        """Reads a tokenizers JSON file. ConfigError names a file that cannot be read."""
        try:
            bpe = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigError(f"cannot read the tokenizer {path}: {error}.") from None
        return cls(bpe, special_ids, dialogue)

    def save(self, path: str | os.PathLike) -> None:
        write_atomic(Path(path), self._bpe.to_str(pretty=True))

    def __len__(self) -> int:
        return self._bpe.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._encoding(text).ids

    def encode_with_placeholders(
        self, text: str, placeholder: str
    ) -> tuple[list[int | None], list[int]]:
        """Encodes a text with placeholders.

        The text is tokenized with a special token for every placeholder, as transformers does with
        image tokens.

        Returns:
          The tokens, None for every placeholder, and for each the number of characters up to its
          end.
        """
        if placeholder not in text:
            encoding = self._encoding(text)
            return encoding.ids, [end for _, end in encoding.offsets]
        stand_in = STAND_IN * len(placeholder)
        tokenizer = self._with_token(stand_in)
        encoding = _encoding(tokenizer, text.replace(placeholder, stand_in))
        stand_in_id = tokenizer.token_to_id(stand_in)
        ids = [None if i == stand_in_id else i for i in encoding.ids]
        return ids, [end for _, end in encoding.offsets]

    @functools.cache  # noqa: B019 (a process has a few tokenizers)
    def _with_token(self, token: str) -> tokenizers.Tokenizer:
        """Returns a copy of the tokenizer with one more token."""
        copied = tokenizers.Tokenizer.from_str(self._bpe.to_str())
        copied.encode_special_tokens = True
        copied.add_tokens([tokenizers.AddedToken(token, normalized=False)])
        return copied

    def count_tokens(self, texts: Sequence[str], placeholder: str) -> list[int]:
        """Returns the number of tokens of each text; a placeholder counts as one.

        The texts are tokenized on all cores.
        """
        stand_in = STAND_IN * len(placeholder)
        texts = [text.replace(placeholder, stand_in) for text in texts]
        encodings = self._with_token(stand_in).encode_batch_fast(texts, add_special_tokens=False)
        return [len(encoding) for encoding in encodings]

    def _encoding(self, text: str) -> tokenizers.Encoding:
        return _encoding(self._bpe, text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text up to its end token, without special tokens and unknown ids."""
        ids = itertools.takewhile(lambda i: i not in self.eos_ids, map(int, ids))
        return self._bpe.decode(list(ids), skip_special_tokens=True)

    def show_token(self, token_id: int) -> str:
        """Returns the text of one token with its space, for a reader; "" for an unknown id."""
        piece = self._bpe.id_to_token(int(token_id)) or ""
        text = self._bpe.decode([int(token_id)], skip_special_tokens=False)
        # A part of a character has no text of its own.
        if not text or "\ufffd" in text:
            return piece
        if piece.startswith(SPACE_MARKS) and not text.startswith(" "):
            return f" {text}"
        return text

    @property
    def eos_id(self) -> int:
        return self._special_ids[-1]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer; a public checkpoint may have several."""
        return (self.eos_id,) if self.dialogue is None else self.dialogue.eos_ids

    @property
    def begin_id(self) -> int:
        """Token before a text that would be empty: the end of text, as in GPT-2."""
        return self.eos_id


def _encoding(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except TypeError:  # half a surrogate pair: a shell passes bytes that are not UTF-8 so
        raise ConfigError(f"{text!r} is not text in UTF-8.") from None
