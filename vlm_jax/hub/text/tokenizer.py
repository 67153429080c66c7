"""Text <-> token ids, as a checkpoint's folder defines them; ids are those of transformers 5.23's AutoTokenizer."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from vlm_jax.config import CheckpointError
from vlm_jax.hub.tensors.folder import existing_folder
from vlm_jax.hub.text.special_tokens import TOKENIZER, TOKENIZER_CONFIG, read_if_there
from vlm_jax.hub.text.tokenizer_files import (
    CONFIG,
    SENTENCEPIECE,
    VOCAB,
    read_pipeline,
)

GENERATION_CONFIG = "generation_config.json"
REPLACEMENT_CHAR = "\ufffd"  # what bytes decode to that are no character, or not yet
SPACED_PUNCTUATION = (
    " .",
    " ?",
    " !",
    " ,",
    " ' ",
    " n't",
    " 'm",
    " 's",
    " 've",
    " 're",
)  # what tidying strips of spaces
IMAGE_TOKENS = (
    "<image>",
    "<|image|>",
)  # of published families; the first is added where a run needs one
NEWLINE_TOKEN = "|NEWLINE|"  # Fuyu's


class HubTokenizer:
    """The tokenizer of a checkpoint.

    Attributes:
      special_tokens: "bos_token" -> its text, for every token that has a name; what a chat template may use.
      bos_id, pad_id: None where no file names one.
      eos_ids: tokens that end an answer; empty if no file names one.
      tidies: decoding takes spaces before punctuation away.
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
        bos, eos, pad = (
            backend.token_to_id(special_tokens.get(f"{name}_token", ""))
            for name in ("bos", "eos", "pad")
        )
        self.bos_id = stated_ids.get("bos_token_id") if bos is None else bos
        self.pad_id = stated_ids.get("pad_token_id") if pad is None else pad
        self.eos_ids = to_tuple(stated_ids.get("eos_token_id")) or to_tuple(eos)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "HubTokenizer":
        """Reads `tokenizer.json`, `vocab.json` and `merges.txt`, or SentencePiece's `tokenizer.model`.

        What ends an answer is said by `generation_config.json`, else `config.json`, else the tokenizer; what starts a
        text and what pads it by the tokenizer first.

        Raises:
          CheckpointError: there is no folder, no tokenizer in it, or a file is damaged or does not fit the others.
        """
        folder = existing_folder(folder)
        backend, special, kind = read_pipeline(folder)
        cleans_up_spaces = read_if_there(folder / TOKENIZER_CONFIG).get(
            "clean_up_tokenization_spaces"
        )
        is_bpe = (
            type(backend.model).__name__ == "BPE"
        )  # whose tokens hold no spaces but those of the text
        end_of_word = kind.end_of_word if kind else ""
        stated = stated_ids(folder, read_if_there(folder / CONFIG))
        return cls(
            backend, special.texts, stated, end_of_word, bool(cleans_up_spaces) and not is_bpe
        )

    @property
    def backend(self) -> Tokenizer:
        """What does the work, for a run that keeps a tokenizer of its own."""
        return self._backend

    @property
    def image_id(self) -> int | None:
        """The token that stands for an image; None where the tokenizer has none."""
        named = self.special_tokens.get("image_token")
        found = map(self._backend.token_to_id, (named, *IMAGE_TOKENS) if named else IMAGE_TOKENS)
        return next((i for i in found if i is not None), None)

    @property
    def newline_id(self) -> int | None:
        """The token that ends a row of image tokens: the checkpoint's own, or that of a line end."""
        own = self._backend.token_to_id(NEWLINE_TOKEN)
        return own if own is not None else next(iter(self.encode("\n", False)[-1:]), None)

    @property
    def next_id(self) -> int:
        """The id that a token added now would get."""
        return max(self._backend.get_vocab().values(), default=-1) + 1

    def __len__(self) -> int:
        """The number of tokens, added ones included; the model's table of embeddings may have more rows."""
        return self._backend.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; special tokens in the text are found, `add_special_tokens` puts others around it.

        Raises:
          CheckpointError: the text is no valid Unicode.
        """
        return self._encoding(text, add_special_tokens).ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text without others around it, and the number of characters up to the end of each.

        Raises:
          CheckpointError: the text is not valid Unicode.
        """
        encoding = self._encoding(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def _encoding(self, text: str, add_special_tokens: bool) -> Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:  # half of a surrogate pair, as bytes become that are not UTF-8
            raise CheckpointError("the text is not valid Unicode.") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; an id that is no token's is left out."""
        text = self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        if self._end_of_word:
            text = text.replace(self._end_of_word, " ").strip()
        if self.cleans_up_spaces:
            for loose in SPACED_PUNCTUATION:
                text = text.replace(loose, loose.strip())
        return text

    def id_of(self, token: str) -> int:
        """The id of a token. CheckpointError where it is none."""
        found = self._backend.token_to_id(token)
        if found is None:
            raise CheckpointError(f"the tokenizer has no token {token!r}.")
        return found

    def id_to_token(self, number: int) -> str:
        """The text of a token, special ones included."""
        return self._backend.id_to_token(number) or ""

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        return TextStream(self, skip_special_tokens)


class TextStream:
    """Ids one after the other -> the text that each adds; a character appears when its last byte is there."""

    def __init__(self, tokenizer: HubTokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._shown = 0  # characters that were returned

    def feed(self, ids: Iterable[int]) -> str:
        """The new text that more ids make certain; empty while a character is not complete."""
        self._ids.extend(int(i) for i in ids)
        text = self._text().rstrip(REPLACEMENT_CHAR)
        if (
            self._tokenizer.cleans_up_spaces
        ):  # two more words may take a space away: "do n ' t" becomes "don't"
            text = text.rsplit(" ", 2)[0]
        return self._from_shown(text)

    def end(self) -> str:
        """What was held back, when no more ids come."""
        return self._from_shown(self._text())

    def _text(self) -> str:
        # All ids anew: what a token adds depends on those before it, such as the space that a text does not start with.
        return self._tokenizer.decode(self._ids, self._skip_special_tokens)

    def _from_shown(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new


def stated_ids(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the keys `..._token_id`: of generation_config.json, else of `config`, else of its part about text.

    Raises:
      CheckpointError: eos_token_id is neither an id nor a list of ids.
    """
    sources = [
        config.get("decoder"),
        config.get("text_config"),
        config,
        read_if_there(folder / GENERATION_CONFIG),
    ]
    stated = {}
    for source in (source for source in sources if isinstance(source, dict)):
        stated |= {
            key: value
            for key, value in source.items()
            if key.endswith("_token_id") and value is not None
        }
    end = stated.get("eos_token_id")
    if not are_ids(*to_tuple(end)):
        raise CheckpointError(
            f"{folder}: eos_token_id is {end!r}, but has to be an id, or a list of ids."
        )
    return stated


def to_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    """Token ids of a value that holds one, several or none."""
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def are_ids(*values) -> bool:
    """Whether all values can be token ids."""
    return all(type(value) is int and 0 <= value < 2**31 for value in values)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (TOKENIZER, VOCAB, *SENTENCEPIECE))
