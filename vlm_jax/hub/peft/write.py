"""Writes the adapters of a run in the format of PEFT.

Fused projections of the files, such as Phi-3's qkv_proj, become one adapter of the ranks together:
lora_A is stacked, and each output has its own columns of lora_B.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from vlm_jax import axes
from vlm_jax.config import CheckpointError, Experiment, Lora
from vlm_jax.hub.export import matching_family
from vlm_jax.hub.families.family import Family, Json
from vlm_jax.hub.families.table import Row, Target
from vlm_jax.hub.peft.adapter import CONFIG, PREFIX, WEIGHTS
from vlm_jax.hub.tensors.folder import all_or_none, write_tensors
from vlm_jax.nn import lora
from vlm_jax.nn.layers import LORA_A, LORA_B
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.parts import is_adapter, trained_paths

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Layer:
    """The adapter of a module as PEFT stores it, with its rank and alpha."""

    lora_a: np.ndarray  # (rank, in)
    lora_b: np.ndarray  # (out, rank)
    alpha: float
    is_transposed: bool  # the module is a Conv1D, whose weight has the inputs first

    @property
    def rank(self) -> int:
        return len(self.lora_a)


def write_adapter(
    cfg: Experiment, params: Mapping, output: str | os.PathLike, base: Path | None = None
) -> str:
    """Writes adapter_config.json and adapter_model.safetensors, with the names of transformers 5.

    Parts that are trained without adapters are written whole (`modules_to_save`).

    Args:
      params: of a run, its adapters not merged.
      base: folder with the config.json of the checkpoint that the run began with.

    Returns:
      the model_type of the base model.

    Raises:
      CheckpointError: no family has this architecture, PEFT cannot save modules of a trained part
        or an adapter, or the output cannot be written.
    """
    if (Path(os.path.expanduser(output)) / CONFIG).exists():
        raise CheckpointError(f"--output {output} holds an adapter already: choose another folder.")
    family = matching_family(cfg, base=base)
    boxes = traverse_util.flatten_dict(abstract_params(cfg), sep="/")
    flat_params = traverse_util.flatten_dict(params, sep="/")
    rows = {module_name(family, row): row for row in family.param_table(cfg)}
    layers = {}
    for name, row in rows.items():
        layer = _layer(cfg.lora, row, boxes, flat_params)
        if layer is not None and not name.endswith(".weight"):
            raise CheckpointError(
                f"{name} is a parameter without a linear module, whose adapter PEFT cannot store: "
                "export the merged model, without --adapter."
            )
        if layer is not None:
            layers[name.removesuffix(".weight")] = layer
    saved = modules_to_save(cfg, rows, boxes)
    tensors: Tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b
    for module in saved:
        for name, row in rows.items():
            if name.startswith(f"{module}."):
                arrays = [_read(target, target.param, flat_params) for target in row.targets]
                tensors[f"{PREFIX}{name}"] = row.to_hf(arrays)
    config = adapter_config(cfg, layers, saved)
    with all_or_none(output) as stage:
        write_tensors(stage, tensors, tensors.__getitem__, file_name=WEIGHTS[0])
        (stage / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return family.model_type


def module_name(family: Family, row: Row) -> str:
    """Returns the name of a row's tensor in the modules of transformers 5."""
    name = row.tensor
    for pattern, replacement in family.module_names:
        name = re.sub(pattern, replacement, name)
    return name


def adapter_config(cfg: Experiment, layers: Mapping[str, Layer], saved: list[str]) -> Json:
    """Returns adapter_config.json; modules are listed by their full names."""
    rank, alpha = cfg.lora.rank, cfg.lora.alpha
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": cfg.init_from or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": cfg.lora.dropout,
        "use_rslora": cfg.lora.rslora,
        "bias": "none",
        # Where layers of both kinds are adapted, PEFT corrects it by the class of the layer.
        "fan_in_fan_out": all(layer.is_transposed for layer in layers.values()),
        "target_modules": list(layers),
        "rank_pattern": {name: x.rank for name, x in layers.items() if x.rank != rank},
        "alpha_pattern": {name: x.alpha for name, x in layers.items() if x.alpha != alpha},
        "modules_to_save": saved or None,
    }


def modules_to_save(
    cfg: Experiment, rows: Mapping[str, Row], boxes: Mapping[str, axes.Partitioned]
) -> list[str]:
    """Returns the outermost modules that hold parameters which are trained without adapters.

    Raises:
      CheckpointError: such a module holds an adapter, too.
    """
    trained = trained_paths([tuple(path.split("/")) for path in boxes], cfg.optim)
    whole = {"/".join(path) for path in trained if not is_adapter(path)}
    modules = set()
    for name, row in rows.items():
        if any(target.param in whole for target in row.targets):
            modules.add(name.rpartition(".")[0])
    outer = [name for name in sorted(modules) if not any(map(modules.__contains__, _above(name)))]
    for module in outer:
        inside = [row for name, row in rows.items() if name.startswith(f"{module}.")]
        for target in [target for row in inside for target in row.targets]:
            if _adapter_path(target, LORA_A) in boxes:
                raise CheckpointError(
                    f"{module} is trained in part with adapters and in part without, which PEFT "
                    "cannot store: export the merged model, without --adapter."
                )
    return outer


def _above(name: str) -> list[str]:
    """Returns the modules around a module: "a.b.c" -> ["a", "a.b"]."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _adapter_path(target: Target, name: str) -> str:
    return f"{target.param.rpartition('/')[0]}/{name}"


def _read(target: Target, path: str, params: Mapping) -> np.ndarray:
    """Returns a parameter, or one layer of a stacked one, in float32."""
    array = params[path] if target.layer is None else params[path][target.layer]
    return np.asarray(jax.device_get(array)).astype(np.float32)


def _layer(cfg: Lora, row: Row, boxes: Mapping, params: Mapping) -> Layer | None:
    """Returns the adapter of a tensor of the files; None: none of its parameters has one."""
    targets = [target for target in row.targets if _is_adapted(target, boxes)]
    if not targets:
        return None
    settings = [lora.find_target(cfg, tuple(target.param.split("/"))) for target in targets]
    rank = sum(setting.rank for setting in settings)
    # Scales of a fused tensor's parts may differ, but the file has one.
    scale = cfg.scale(settings[0].rank, settings[0].alpha)
    lora_a, wide_b, first_rank = [], {}, 0
    for target, setting in zip(targets, settings):
        a = _read(target, _adapter_path(target, LORA_A), params)
        b = _read(target, _adapter_path(target, LORA_B), params)
        outputs = [1] * (b.ndim - 2)
        # In the layout of a kernel (inputs, outputs) whose outputs are the ranks.
        lora_a.append(replace(row, targets=(target,)).to_hf([a.reshape(*a.shape, *outputs)]))
        wide_b[target] = np.zeros((rank, *b.shape[1:]), np.float32)
        ranks = slice(first_rank, first_rank + setting.rank)
        wide_b[target][ranks] = b * (cfg.scale(setting.rank, setting.alpha) / scale)
        first_rank += setting.rank
    # In the layout of a kernel whose inputs are the ranks.
    contracted = boxes[row.targets[0].param].contracted
    kernels = []
    for target in row.targets:
        outputs = target.shape({target.param: boxes[target.param].value.shape})[contracted:]
        b = wide_b.get(target, np.zeros((rank, *outputs), np.float32))
        kernels.append(b.reshape(rank, *[1] * (contracted - 1), *outputs))
    lora_b = row.to_hf(kernels)
    is_transposed = row.stores_inputs_first(contracted)
    if is_transposed:
        lora_a, lora_b = [a.T for a in lora_a], lora_b.T
    alpha = scale * (math.sqrt(rank) if cfg.rslora else rank)
    return Layer(np.concatenate(lora_a), np.ascontiguousarray(lora_b), alpha, is_transposed)


def _is_adapted(target: Target, boxes: Mapping) -> bool:
    return target.param.endswith("/kernel") and _adapter_path(target, LORA_A) in boxes
