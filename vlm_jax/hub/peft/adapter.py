"""Reads LoRA adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. A product W (out, in) of a
module gets lora_A (rank, in) and lora_B (out, rank); `modules_to_save` are stored whole.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm_jax.config import CheckpointError
from vlm_jax.hub.families.family import Json, get_or
from vlm_jax.hub.tensors.folder import ADAPTER_CONFIG as CONFIG
from vlm_jax.hub.tensors.folder import existing_folder, open_tensors, read_json
from vlm_jax.hub.tensors.mapped import StoredTensor

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
# Keys of the config that are read, or that change no output of a trained adapter. Another key with
# a value is refused, because it may change the outputs.
KNOWN = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "bias", "init_lora_weights", "lora_dropout", "fan_in_fan_out"),
    # The names of the tensors already are the result of these.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "megatron_core", "qalora_group_size", "loftq_config", "eva_config"),
}
PEFT_DEFAULT = 8  # of r and lora_alpha
# Methods of initialization that leave the base model as it is; PiSSA, OLoRA and others change it.
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraLayer:
    """The adapter of one module; its weight gets scale * lora_B lora_A."""

    lora_a: StoredTensor  # (rank, in), or of a convolution (rank, channels, height, width)
    lora_b: StoredTensor  # (out, rank), or of a convolution (out, rank, 1, 1)
    scale: float

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the adapted weight in the layout of torch's Linear or convolution."""
        return (self.lora_b.shape[0], *self.lora_a.shape[1:])

    def product(self) -> np.ndarray:
        """Returns scale * lora_B lora_A in float32."""
        lora_a = self.lora_a.read().astype(np.float32).reshape(self.rank, -1)
        lora_b = self.lora_b.read().astype(np.float32).reshape(-1, self.rank)
        return (self.scale * (lora_b @ lora_a)).reshape(self.shape)


@dataclass(frozen=True)
class Adapter:
    """A folder of PEFT whose config and tensors have been checked, but not against a model.

    Attributes:
      layers: by the name of the module's weight in the model that PEFT wrapped.
      saved: tensors of `modules_to_save`, by their names in that model.
    """

    folder: Path
    config: Json
    layers: Mapping[str, LoraLayer]
    saved: Mapping[str, StoredTensor]

    @property
    def use_rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))


def read_adapter(folder: str | os.PathLike) -> Adapter:
    """Reads the folder of an adapter; its tensors stay mapped.

    Raises:
      CheckpointError: the folder has no adapter, its files are damaged, or it uses a method or an
        option that is not supported.
    """
    folder = existing_folder(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is not a PEFT adapter: it has no {CONFIG}.")
    config = read_json(folder / CONFIG)
    _check_config(config, folder)
    tensors = open_tensors(folder, WEIGHTS)
    sides: dict[str, dict[str, StoredTensor]] = {}
    saved = {}
    for stored_name in tensors:
        name = stored_name.removeprefix(PREFIX)
        match = LORA.fullmatch(name)
        if match:
            sides.setdefault(match["module"], {})[match["side"]] = tensors[stored_name]
        elif ".lora_" in name:
            raise CheckpointError(
                f"{folder}: {stored_name} is not supported, only lora_A.weight and lora_B.weight."
            )
        else:
            saved[_unwrapped(name)] = tensors[stored_name]
    if not sides:
        raise CheckpointError(f"{folder} holds no tensor lora_A.weight: it adapts nothing.")
    layers = {
        f"{module}.weight": _layer(module, pair, config, folder) for module, pair in sides.items()
    }
    return Adapter(folder, config, layers, saved)


def _unwrapped(name: str) -> str:
    """Drops the names of PEFT's wrappers, which earlier versions wrote."""
    return re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", name)


def _check_config(config: Json, folder: Path) -> None:
    path = folder / CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type {kind} is not supported, only LORA.")
    if get_or(config, "bias", "none") != "none":
        raise CheckpointError(f"{path}: bias {config['bias']} is not supported, only none.")
    init = config.get("init_lora_weights", True)
    if init not in KEEPS_BASE:
        raise CheckpointError(
            f"{path}: init_lora_weights {init} is not supported, because it changes the base "
            "model: convert the adapter to plain LoRA with PEFT."
        )
    for key, value in config.items():
        if key not in KNOWN and value:
            raise CheckpointError(f"{path}: {key} {value} is not supported.")


def _layer(module: str, sides: Mapping[str, StoredTensor], config: Json, folder: Path) -> LoraLayer:
    if len(sides) < 2:
        (side,) = {"A", "B"} - sides.keys()
        raise CheckpointError(f"{folder}: {module}.lora_{side}.weight is missing.")
    path = folder / CONFIG
    rank = _number(config, "r", "rank_pattern", module, path)
    alpha = _number(config, "lora_alpha", "alpha_pattern", module, path)
    lora_a, lora_b = sides["A"], sides["B"]
    if len(lora_a.shape) < 2 or lora_a.shape[0] != rank or lora_b.shape[1:2] != (rank,):
        raise CheckpointError(
            f"{folder}: lora_A {lora_a.shape} and lora_B {lora_b.shape} of {module} do not have "
            f"the rank {rank} of {CONFIG}."
        )
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return LoraLayer(lora_a, lora_b, alpha / divisor)


def _number(config: Json, key: str, patterns: str, module: str, path: Path) -> float:
    """Returns the value of a key for a module: of the first pattern that its name ends with."""
    number = get_or(config, key, PEFT_DEFAULT)
    for pattern, value in get_or(config, patterns, {}).items():
        try:
            is_match = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            message = f"{path}: {patterns} {pattern!r} is not a regular expression ({error})."
            raise CheckpointError(message) from None
        if is_match:
            key, number = f"{patterns} {pattern!r}", value
            break
    if type(number) not in (int, float) or not 0 < number < math.inf:
        raise CheckpointError(f"{path}: {key} is {number!r}, but must be a number above 0.")
    return number
