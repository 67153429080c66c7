"""The tokenizer: one that is trained here on the words of a data set, or one that is read from its file."""

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
STAND_IN = "\ue000"  # a private character of Unicode, which no text uses


class Tokenizer:
    """Byte-level BPE (Radford et al. 2019, GPT-2): any text is encodable, and comes back byte for byte."""

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        special_ids: tuple[int, ...] = SPECIAL_IDS,
        dialogue: Any = None,
    ):
        """`dialogue` is the `hub.dialogue.Dialogue` of a run whose data.template is checkpoint."""
        if special_ids == SPECIAL_IDS and tuple(map(bpe.token_to_id, SPECIALS)) != SPECIAL_IDS:
            raise ConfigError(
                f"a tokenizer needs the tokens {' '.join(SPECIALS)} with the ids 0 to 3"
            )
        bpe.encode_special_tokens = True  # '<eos>' in a user's text is five characters, not the end
        self._bpe, self._special_ids, self.dialogue = bpe, special_ids, dialogue

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, tags: Sequence[str] = ()) -> "Tokenizer":
        """Learns at most `vocab_size` tokens, `tags` among them; the same texts give the same tokenizer."""
        alphabet, specials = sorted(pre_tokenizers.ByteLevel.alphabet()), [*SPECIALS, *tags]
        smallest = len(alphabet) + len(specials)
        if vocab_size < smallest:
            raise ConfigError(
                f"decoder.vocab_size {vocab_size} is too small: bytes and specials take {smallest}"
                + (f", the tags of vision.tiles among them ({len(tags)})" if tags else "")
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
        try:
            bpe = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigError(f"cannot read the tokenizer {path}: {error}") from None
        return cls(bpe, special_ids, dialogue)

    def save(self, path: str | os.PathLike) -> None:
        write_atomic(Path(path), self._bpe.to_str(pretty=True))

    def __len__(self) -> int:
        return self._bpe.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._encoding(text).ids

    def encode_marked(self, text: str, mark: str) -> tuple[list[int | None], list[int]]:
        """The tokens of a text, None for every mark in it, and the number of characters up to the end of each.

        The text is tokenized with a special token in place of every mark, as transformers does with image tokens.
        """
        if mark not in text:
            encoding = self._encoding(text)
            return encoding.ids, [end for _, end in encoding.offsets]
        stand_in = STAND_IN * len(mark)
        tokenizer = self._with_token(stand_in)
        encoding = _encoding(tokenizer, text.replace(mark, stand_in))
        marked = tokenizer.token_to_id(stand_in)
        return [None if i == marked else i for i in encoding.ids], [
            end for _, end in encoding.offsets
        ]

    @functools.cache  # noqa: B019 (there are a few tokenizers in a process)
    def _with_token(self, token: str) -> tokenizers.Tokenizer:
        """A copy of the tokenizer with one more token."""
        copied = tokenizers.Tokenizer.from_str(self._bpe.to_str())
        copied.encode_special_tokens = True
        copied.add_tokens([tokenizers.AddedToken(token, normalized=False)])
        return copied

    def count_tokens(self, texts: Sequence[str], mark: str) -> list[int]:
        """Returns the number of tokens of each text, a mark among them as one; the texts are tokenized on all cores."""
        stand_in = STAND_IN * len(mark)
        marked = [text.replace(mark, stand_in) for text in texts]
        encodings = self._with_token(stand_in).encode_batch_fast(marked, add_special_tokens=False)
        return [len(encoding) for encoding in encodings]

    def _encoding(self, text: str) -> tokenizers.Encoding:
        return _encoding(self._bpe, text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to <eos>, without the tokenizer's special tokens and ids that it does not have."""
        ids = itertools.takewhile(lambda i: i != self.eos_id, map(int, ids))
        return self._bpe.decode(list(ids), skip_special_tokens=True)

    @property
    def eos_id(self) -> int:
        return self._special_ids[-1]

    @property
    def begin_id(self) -> int:
        """The token that begins a text which nothing else begins: the end-of-text token, as in GPT-2."""
        return self.eos_id


def _encoding(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except TypeError:  # half a character, as a shell hands over bytes that are not UTF-8
        raise ConfigError(f"{text!r} is not text in UTF-8") from None
