"""What a family of public checkpoints is: a config mapping and a tensor table, both usable in both directions."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace

from vlm_jax.config import CheckpointError, Experiment
from vlm_jax.hub.families.table import Row
from vlm_jax.hub.tensors.folder import WEIGHTS
from vlm_jax.nn.models import Config

Json = dict
MOST = 2**31 - 1  # of a size in config.json: a larger one overflows the shapes of arrays
Renames = tuple[tuple[str, str], ...]  # pattern and replacement

# Stored in older files though nobody reads them; they are computed from the config.
BUFFERS = re.compile(
    r"(rotary_emb\.inv_freq|embeddings\.position_ids|h\.\d+\.(attn|crossattention)\.(bias|masked_bias)|_float_tensor)$"
)


@dataclass(frozen=True)
class Family:
    """`read` and `write` map config.json to our config and back; `rows` is the table of tensors for a config."""

    model_type: str
    read: Callable[[Json, Collection[str]], Config]  # config.json and the stored names -> config
    write: Callable[[Config], Json]  # config -> config.json as transformers 4.x spells it
    rows: Callable[[Config], list[Row]]
    renames: (
        Renames | Callable[[Collection[str]], Renames]
    ) = ()  # other spellings -> those of the table, in turn
    tolerance: float = 1e-4  # absolute, in float32, for `verify`
    image_token: int | None = None  # the id of an image token where config.json does not say it
    config_file: str = "config.json"
    weights_file: str = WEIGHTS  # what is written; `files.READABLE` is what is read
    splits: tuple[
        tuple[str, tuple[str, ...]], ...
    ] = ()  # in a name, and in those of its parts where they are apart

    def canonical(self, names: Collection[str]) -> dict[str, str]:
        """Stored names, buffers left out -> {name in the table: stored name}."""
        found: dict[str, str] = {}
        renames = self.renames(names) if callable(self.renames) else self.renames
        for stored in names:
            if BUFFERS.search(stored):
                continue
            name = stored
            for pattern, replacement in renames:
                name = re.sub(pattern, replacement, name)
            if name in found:
                raise CheckpointError(
                    f"{stored} and {found[name]} are two spellings of one tensor."
                )
            found[name] = stored
        return found

    def stored_rows(self, cfg: Config, names: Collection[str]) -> list[Row]:
        """The table of a folder with such names, in which the parts of a row may be tensors of their own."""
        return [found for row in self.rows(cfg) for found in self._apart(row, names)]

    def _apart(self, row: Row, names: Collection[str]) -> list[Row]:
        for whole, parts in self.splits:
            pieces = [
                Row(row.hub.replace(whole, name), (part,)) for name, part in zip(parts, row.parts)
            ]
            if whole in row.hub and any(piece.hub in names for piece in pieces):
                return pieces
        return [row]


def get(config: Mapping, key: str, default):
    """The value of a key; missing and null are the default of the family."""
    value = config.get(key)
    return default if value is None else value


def size(config: Mapping, key: str, default: int | None = None) -> int:
    """The whole number of a key, from 1 on; missing and null are the default. CheckpointError names the key."""
    value = get(config, key, default)
    if type(value) is not int or not 1 <= value <= MOST:
        raise CheckpointError(
            f"config.json: {key} is {value!r}: it must be a whole number from 1 to {MOST}."
        )
    return value


def number(config: Mapping, key: str, default: float | None = None) -> float:
    """The number of a key, above 0; missing and null are the default. CheckpointError names the key."""
    value = get(config, key, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {key} is {value!r}: it must be a number above 0.")
    return value


def unaliased(config: Json, names: Mapping[str, str]) -> Json:
    """The config with the keys of `names` under the names they stand for (`attribute_map` of transformers).

    As there, an alias overrides the key that it stands for.
    """
    given = {name: config[alias] for alias, name in names.items() if config.get(alias) is not None}
    return config | given


def choose(config: Mapping, key: str, choices: Mapping, default: str):
    """What a word in config.json stands for. CheckpointError lists the words that are known."""
    word = get(config, key, default)
    if word not in choices:
        raise CheckpointError(
            f"config.json: {key} {word!r} is not supported: choose {', '.join(map(str, choices))}."
        )
    return choices[word]


def refuse(config: Mapping, key: str, *allowed) -> None:
    """CheckpointError where a key has another value than those that are allowed; a missing key is fine."""
    if key in config and config[key] not in allowed:
        raise CheckpointError(
            f"config.json: {key} {config[key]!r} is not supported, only {allowed[0]!r}."
        )


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
}
HUB_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
    "relu2": "relu2",
}


def text_experiment(decoder) -> Experiment:
    """A decoder alone."""
    base = Experiment()
    return replace(base, fusion=replace(base.fusion, kind="text_only"), decoder=decoder)


def changed_fields(a, b) -> list[str]:
    """The fields in which two configs of one kind differ."""
    return [field.name for field in fields(a) if getattr(a, field.name) != getattr(b, field.name)]
