"""Special and added tokens of a checkpoint's tokenizer, merged from all tokenizer files.

Precedence and order follow transformers 5.23 (`tokenization_utils_base.py`,
`tokenization_utils_tokenizers.py`): tokens that the vocabulary lacks get the next free ids, in the
order in which they are added.
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
    # "bos_token" -> token; None: the checkpoint has none.
    named: dict[str, AddedToken | None] = field(default_factory=dict)
    # None: no file lists any, not even an empty list.
    unnamed: list[AddedToken] | None = None
    # Token id -> token, special or not.
    added: dict[int, AddedToken] = field(default_factory=dict)

    @property
    def texts(self) -> dict[str, str]:
        """Text of every named token, such as bos_token -> <s>."""
        return {name: str(token) for name, token in self.named.items() if token is not None}


def read_special_tokens(folder: Path, settings: dict, tokenizer_json: dict) -> SpecialTokens:
    """Reads the tokens of tokenizer_config.json, or, if it lists no added tokens, of older files.

    Args:
      settings: content of tokenizer_config.json.
      tokenizer_json: content of tokenizer.json.

    Raises:
      CheckpointError: an entry is not a token.
    """
    lists_added = "added_tokens_decoder" in settings
    older = {} if lists_added else read_json_if_exists(folder / SPECIAL_TOKENS)
    older = {
        key: value | {"special": True} if isinstance(value, dict) else value
        for key, value in older.items()
    }
    older_added = {} if lists_added else read_json_if_exists(folder / ADDED_TOKENS)
    try:
        special = SpecialTokens(_named(settings | older), _unnamed(settings, older))
        if lists_added:
            decoder = settings["added_tokens_decoder"]
            special.added = {int(number): to_token(token) for number, token in decoder.items()}
        else:
            special.added = _added(older_added, tokenizer_json, special)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        path = folder / TOKENIZER_CONFIG
        raise CheckpointError(
            f"{path}, or a tokenizer file beside it, has an invalid token entry: {error}."
        ) from None
    added = {str(token): token for token in special.added.values()}
    special.named = {name: added.get(str(token), token) for name, token in special.named.items()}
    return special


def read_json_if_exists(path: Path) -> dict:
    """Object of a JSON file; empty if the file does not exist."""
    return read_json(path) if os.path.isfile(path) else {}


def add_special_tokens(backend: Tokenizer, special: SpecialTokens) -> None:
    """Adds the tokens to a pipeline, which then recognizes them in text; marks special ones."""
    tokens = [token for _, token in sorted(special.added.items())]
    known = {str(token) for token in (*backend.get_added_tokens_decoder().values(), *tokens)}
    named = dict.fromkeys(NAMED) | special.named
    for token in (*named.values(), *(special.unnamed or [])):
        if token is not None and str(token) not in known:
            known.add(str(token))
            tokens.append(token)
    for token in tokens:
        token.special = token.special or str(token) in special.texts.values()
    backend.add_tokens(tokens)


def set_template(backend: Tokenizer, before: str | None, after: str | None) -> None:
    """Sets the special tokens that the pipeline puts before and after every text."""
    around = {token: backend.token_to_id(token) for token in (before, after) if token is not None}
    template = [token for token in (before, "$A", after) if token is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(around.items())
    )


def to_token(value: str | Mapping) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    return AddedToken(**{key: flag for key, flag in value.items() if key not in ("__type", "id")})


def _named(values: dict[str, Any]) -> dict[str, AddedToken | None]:
    """Tokens of every key that ends in `_token`, and of lists that name their entries."""
    tokens = {key: value for key, value in values.items() if key.endswith("_token")}
    for key in UNNAMED:
        tokens |= values[key] if isinstance(values.get(key), dict) else {}
    return {
        key: value and to_token(value)
        for key, value in tokens.items()
        if isinstance(value, str | dict | None)
    }


def _unnamed(settings: dict, older: dict) -> list[AddedToken] | None:
    lists = [source[key] for source in (settings, older) for key in UNNAMED if key in source]
    if not lists:
        return None
    tokens = next((value for value in lists if value), [])
    # An object has names for its tokens: `_named` returns those.
    return [] if isinstance(tokens, dict) else [to_token(token) for token in tokens]


def _added(
    older: dict[str, int], tokenizer_json: dict, special: SpecialTokens
) -> dict[int, AddedToken]:
    """Tokens of added_tokens.json and tokenizer.json, by id."""
    specials = {*special.texts.values(), *map(str, special.unnamed or [])}
    added = {
        number: AddedToken(text, normalized=text not in specials, special=text in specials)
        for text, number in older.items()
    }
    return added | {
        token["id"]: to_token(token) for token in tokenizer_json.get("added_tokens", [])
    }
