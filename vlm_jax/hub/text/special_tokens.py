"""The special and added tokens of a checkpoint's tokenizer, from whichever files say something about them.

Precedence and order are those of transformers 5.23 (`tokenization_utils_base.py`, `tokenization_utils_tokenizers.py`):
tokens that a vocabulary lacks get the next free ids in the order in which they are added.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from vlm_jax.config import CheckpointError
from vlm_jax.hub.tensors.folder import read_json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"

NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
UNNAMED = ("extra_special_tokens", "additional_special_tokens")


@dataclass
class SpecialTokens:
    named: dict[str, AddedToken | None] = field(
        default_factory=dict
    )  # "bos_token" -> it; None: there is none
    unnamed: list[AddedToken] | None = None  # None: no file lists any, not even an empty list
    added: dict[int, AddedToken] = field(
        default_factory=dict
    )  # id -> token, whether special or not

    @property
    def texts(self) -> dict[str, str]:
        """Of those that have a name: bos_token -> <s>, for instance."""
        return {name: str(token) for name, token in self.named.items() if token is not None}


def read_special_tokens(folder: Path, settings: dict, whole: dict) -> SpecialTokens:
    """What tokenizer_config.json says, or, where it lists no added tokens, the older files beside it.

    Args:
      settings: what is in tokenizer_config.json.
      whole: what is in tokenizer.json.

    Raises:
      CheckpointError: what stands for a token is none.
    """
    lists_added = "added_tokens_decoder" in settings
    older = {} if lists_added else read_if_there(folder / SPECIAL_TOKENS)
    older = {
        key: value | {"special": True} if isinstance(value, dict) else value
        for key, value in older.items()
    }
    older_added = {} if lists_added else read_if_there(folder / ADDED_TOKENS)
    try:
        special = SpecialTokens(_named(settings | older), _unnamed(settings, older))
        if lists_added:
            special.added = {
                int(number): to_token(token)
                for number, token in settings["added_tokens_decoder"].items()
            }
        else:
            special.added = _added(older_added, whole, special)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        path = folder / TOKENIZER_CONFIG
        raise CheckpointError(
            f"{path}, or a file beside it, lists a token that is none: {error}."
        ) from None
    added = {str(token): token for token in special.added.values()}
    special.named = {name: added.get(str(token), token) for name, token in special.named.items()}
    return special


def read_if_there(path: Path) -> dict:
    return read_json(path) if os.path.isfile(path) else {}


def add_special_tokens(backend: Tokenizer, special: SpecialTokens) -> None:
    """Makes a pipeline find the tokens in a text, and know which of them are special."""
    tokens = [token for _, token in sorted(special.added.items())]
    known = {str(token) for token in (*backend.get_added_tokens_decoder().values(), *tokens)}
    for token in (*(dict.fromkeys(NAMED) | special.named).values(), *(special.unnamed or [])):
        if token is not None and str(token) not in known:
            known.add(str(token))
            tokens.append(token)
    for token in tokens:
        token.special = token.special or str(token) in special.texts.values()
    backend.add_tokens(tokens)


def set_template(backend: Tokenizer, before: str | None, after: str | None) -> None:
    """Sets the special tokens that stand before and after every text."""
    around = {token: backend.token_to_id(token) for token in (before, after) if token is not None}
    template = [*([] if before is None else [before]), "$A", *([] if after is None else [after])]
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(around.items())
    )


def to_token(value: str | Mapping) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    return AddedToken(**{key: flag for key, flag in value.items() if key not in ("__type", "id")})


def _named(values: dict[str, Any]) -> dict[str, AddedToken | None]:
    """Every key that ends in `_token`, and what is listed with a name of its own."""
    found = {key: value for key, value in values.items() if key.endswith("_token")}
    for key in UNNAMED:
        found |= values[key] if isinstance(values.get(key), dict) else {}
    return {
        key: value and to_token(value)
        for key, value in found.items()
        if isinstance(value, str | dict | None)
    }


def _unnamed(settings: dict, older: dict) -> list[AddedToken] | None:
    values = [source[key] for source in (settings, older) for key in UNNAMED if key in source]
    chosen = next((value for value in values if value), [])
    return [to_token(token) for token in chosen if not isinstance(chosen, dict)] if values else None


def _added(older: dict[str, int], whole: dict, special: SpecialTokens) -> dict[int, AddedToken]:
    """Of added_tokens.json and tokenizer.json."""
    specials = {*special.texts.values(), *map(str, special.unnamed or [])}
    added = {
        number: AddedToken(text, normalized=text not in specials, special=text in specials)
        for text, number in older.items()
    }
    return added | {token["id"]: to_token(token) for token in whole.get("added_tokens", [])}
