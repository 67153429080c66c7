"""A model family of Hugging Face: config mapping and weight table, each used in both directions."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from vlm_jax.config import CheckpointError, Experiment
from vlm_jax.hub.families.table import Row
from vlm_jax.hub.tensors.folder import WEIGHTS
from vlm_jax.nn.models import Config

Json = dict
MAX_SIZE = 2**31 - 1  # of a size in config.json: a larger one overflows array shapes
Renames = tuple[tuple[str, str], ...]  # (regular expression, replacement)

# Buffers in the files of older versions of transformers: they are computed from the config.
BUFFERS = re.compile(
    r"(rotary_emb\.inv_freq|embeddings\.position_ids|_float_tensor"
    r"|h\.\d+\.(attn|crossattention)\.(bias|masked_bias))$"
)


@dataclass(frozen=True)
class HfProcessor:
    """The processor class of a family in transformers, as far as an exported run must suit it.

    Attributes:
      name: of the class.
      adds_bos: its own code writes the bos token, rather than its tokenizer.
      needs_bos: its prompts begin with a bos token in any case.
      needs_placeholder: every image needs a placeholder token in the text.
      resize: the only supported `vision.resize`; empty: any.
      keeps_image_size: images keep sizes of their own.
      has_prompt_format: it writes prompts in its own format, without a chat template.
      counts_patches: it expands the image token by the encoder's patch size and class token.
      counts_image_tokens: it expands the image token by the key `token_count_key`.
      token_count_key: of processor_config.json, with the number of tokens of an image.
      image_processor: the image processor class that it needs; empty: any.
    """

    name: str
    adds_bos: bool = False
    needs_bos: bool = False
    needs_placeholder: bool = False
    resize: str = ""
    keeps_image_size: bool = False
    has_prompt_format: bool = False
    counts_patches: bool = False
    counts_image_tokens: bool = False
    token_count_key: str = "image_seq_length"
    image_processor: str = ""


@dataclass(frozen=True)
class Family:
    """A model family of Hugging Face: config mapping and weight table, used in both directions.

    Attributes:
      model_type: of config.json.
      config_from_hf: config.json and the tensor names of the files -> config.
      config_to_hf: config -> config.json with the keys of transformers 4.x.
      param_table: config -> rows of the weight table.
      renames: other tensor names -> names in the table, in order; may depend on all names.
      tolerance: absolute error of float32 outputs, for `verify`.
      image_token: id of the image placeholder token if config.json does not give one.
      config_file: name of config.json.
      weights_file: name of an exported weight file.
      processor: of transformers; None for a family without text or without images.
      module_names: names in the table -> names of modules in transformers 5, where they differ.
      counts_positions: `forward` of transformers counts positions over the tokens that are not
        padding, as `generate` does; otherwise they are slot indices.
      splits: (part of a name, its replacements in files that store the targets separately).
    """

    model_type: str
    config_from_hf: Callable[[Json, Collection[str]], Config]
    config_to_hf: Callable[[Config], Json]
    param_table: Callable[[Config], list[Row]]
    renames: Renames | Callable[[Collection[str]], Renames] = ()
    tolerance: float = 1e-4
    image_token: int | None = None
    config_file: str = "config.json"
    weights_file: str = WEIGHTS
    processor: HfProcessor | None = None
    splits: tuple[tuple[str, tuple[str, ...]], ...] = ()
    module_names: Renames = ()
    counts_positions: bool = False

    def normalize_names(self, stored_names: Collection[str]) -> dict[str, str]:
        """Returns {name in the table: name in the files}, without buffers."""
        normalized: dict[str, str] = {}
        renames = self.renames(stored_names) if callable(self.renames) else self.renames
        for stored in stored_names:
            if BUFFERS.search(stored):
                continue
            name = stored
            for pattern, replacement in renames:
                name = re.sub(pattern, replacement, name)
            if name in normalized:
                raise CheckpointError(
                    f"{stored} and {normalized[name]} are two names of the same tensor."
                )
            normalized[name] = stored
        return normalized

    def table_for(self, cfg: Config, names: Collection[str]) -> list[Row]:
        """Returns the weight table of a folder with these (normalized) tensor names."""
        rows = []
        for row in self.param_table(cfg):
            rows += self._split(row, names)
        return rows

    def _split(self, row: Row, names: Collection[str]) -> list[Row]:
        """Returns a row for each target if the folder stores them separately, else the row."""
        for fused, parts in self.splits:
            rows = [
                Row(row.tensor.replace(fused, part), (target,))
                for part, target in zip(parts, row.targets)
            ]
            if fused in row.tensor and any(part_row.tensor in names for part_row in rows):
                return rows
        return [row]


def get_or(config: Mapping, key: str, default):
    """Returns the value of a key, or the default if the key is missing or null."""
    value = config.get(key)
    return default if value is None else value


def positive_int(config: Mapping, key: str, default: int | None = None) -> int:
    """Returns an integer of at least 1; a missing or null key has the default.

    Raises:
      CheckpointError: another value, with the key's name.
    """
    value = get_or(config, key, default)
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise CheckpointError(
            f"config.json: {key} is {value!r}, but must be an integer from 1 to {MAX_SIZE}."
        )
    return value


def positive_number(config: Mapping, key: str, default: float | None = None) -> float:
    """Returns a finite number above 0; a missing or null key has the default.

    Raises:
      CheckpointError: another value, with the key's name.
    """
    value = get_or(config, key, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {key} is {value!r}, but must be a number above 0.")
    return value


def resolve_aliases(config: Json, aliases: Mapping[str, str]) -> Json:
    """Returns the config with the values of aliases under their keys.

    `aliases` is `attribute_map` of transformers' config class: alias -> key. An alias wins.
    """
    values = {key: config[alias] for alias, key in aliases.items() if config.get(alias) is not None}
    return config | values


def lookup(config: Mapping, key: str, choices: Mapping, default: str):
    """Returns the choice that a key of config.json names; a missing or null key has the default.

    Raises:
      CheckpointError: an unsupported value, with the supported ones.
    """
    word = get_or(config, key, default)
    if word not in choices:
        raise CheckpointError(
            f"config.json: {key} {word!r} is not supported "
            f"(choose from {', '.join(map(str, choices))})."
        )
    return choices[word]


def reject_unless(config: Mapping, key: str, *allowed) -> None:
    """Checks that a key is missing or has one of the allowed values.

    Raises:
      CheckpointError: another value.
    """
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
    """Returns the experiment of a decoder without images."""
    base = Experiment()
    return replace(base, fusion=replace(base.fusion, kind="text_only"), decoder=decoder)
