"""Continues the training of an adapter that PEFT wrote: its settings, and its parameters here.

A fused projection of the files, such as Phi-3's qkv_proj, becomes an adapter of each of its parts,
with the same lora_a.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from flax import traverse_util
from flax.linen import meta

from vlm_jax.config import CheckpointError, ConfigError, Experiment, Lora
from vlm_jax.config.model import LoraTarget
from vlm_jax.hub.families.table import Row, Target
from vlm_jax.hub.load import Checkpoint, inspect
from vlm_jax.hub.peft.adapter import LoraLayer
from vlm_jax.hub.tensors.folder import open_tensors
from vlm_jax.nn import lora
from vlm_jax.nn.layers import LORA_A, LORA_B
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.parts import Path, find_part, is_adapter, trained_parts
from vlm_jax.runtime.workdir import is_run


class Adapted(NamedTuple):
    """A kernel, or a layer of a stacked one, and the adapter of the tensor that holds it."""

    name: str  # of the tensor, in the adapter's files
    row: Row
    target: Target
    layer: LoraLayer

    @property
    def path(self) -> Path:
        return tuple(self.target.param.split("/"))


def with_adapter_settings(cfg: Experiment, keeps_dropout: bool = False) -> Experiment:
    """Returns the experiment with the ranks, alphas, targets and dropout of `cfg.adapter`.

    Args:
      keeps_dropout: keeps the experiment's own dropout.

    Raises:
      CheckpointError: the adapter cannot be trained here, or not with this experiment.
    """
    if replace(cfg.lora, dropout=0.0) != Lora():
        raise ConfigError(
            f"adapter {cfg.adapter} has its own rank, alpha and targets: leave out all fields of "
            "lora but lora.dropout."
        )
    checkpoint = _open(cfg)
    use_rslora = checkpoint.adapter.use_rslora
    largest: dict[str, LoraLayer] = {}
    for name, _, target, layer in _kernels(checkpoint):
        names = lora.target_names(tuple(target.param.split("/")))
        if not names:
            raise CheckpointError(
                f"adapter {cfg.adapter} adapts {name}, which has no adapter here: merge it with "
                "`export --adapter`, and train the merged model."
            )
        if names[0] not in largest or largest[names[0]].rank < layer.rank:
            largest[names[0]] = layer
    targets = []
    for name, layer in sorted(largest.items()):
        alpha = layer.scale * (math.sqrt(layer.rank) if use_rslora else layer.rank)
        targets.append(LoraTarget(name, layer.rank, alpha))
    rank, alpha = targets[0].rank, targets[0].alpha
    dropout = cfg.lora.dropout
    if not keeps_dropout:
        dropout = float(checkpoint.adapter.config.get("lora_dropout", 0))
    settings = Lora(rank, alpha, dropout, _spell(targets, rank, alpha), use_rslora)
    cfg = replace(cfg, lora=settings)
    _check_saved(cfg, checkpoint)
    return cfg


def _spell(targets: list[LoraTarget], rank: int, alpha: float) -> tuple[str, ...]:
    """Returns `lora.targets`; a target with this rank and alpha needs no numbers."""
    spelled = []
    for target in targets:
        is_default = (target.rank, target.alpha) == (rank, alpha)
        numbers = "" if is_default else f":{target.rank}:{target.alpha}"
        spelled.append(target.name + numbers)
    return tuple(spelled)


def _open(cfg: Experiment) -> Checkpoint:
    """Returns the checkpoint `cfg.init_from` with the adapter, checked against each other."""
    if is_run(cfg.init_from):
        raise ConfigError(
            f"adapter {cfg.adapter} needs its base model, a public checkpoint, in init_from, not "
            f"the run {cfg.init_from}."
        )
    with open_tensors(cfg.init_from) as tensors:
        checkpoint = inspect(cfg.init_from, tensors, adapter=cfg.adapter)
    if checkpoint.cfg.fusion != cfg.fusion:
        raise ConfigError(
            f"adapter {cfg.adapter} needs the fusion of its base model {cfg.init_from}: leave out "
            "all fields of fusion."
        )
    return checkpoint


def _kernels(checkpoint: Checkpoint) -> Iterator[Adapted]:
    adapter, rows = checkpoint.adapter, {row.tensor: row for row in checkpoint.rows}
    for name, name_in_file in checkpoint.family.normalize_names(adapter.layers).items():
        for target in rows[name].targets:
            yield Adapted(name_in_file, rows[name], target, adapter.layers[name_in_file])


def _check_saved(cfg: Experiment, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a saved module that would not be trained here as in PEFT."""
    paths = {tuple(path.split("/")) for path in _flat(abstract_params(cfg))}
    adapted = {find_part(path) for path in paths if is_adapter(path)}
    trained = trained_parts(cfg.optim) - adapted
    rows = {row.tensor: row for row in checkpoint.rows}
    for name, name_in_file in checkpoint.family.normalize_names(checkpoint.adapter.saved).items():
        part = find_part(tuple(rows[name].targets[0].param.split("/")))
        if part not in trained:
            raise CheckpointError(
                f"adapter {cfg.adapter} holds {name_in_file} whole, but the part {part} is frozen "
                "here: merge it with `export --adapter`, and train the merged model."
            )


def load_adapters(cfg: Experiment) -> dict[str, np.ndarray]:
    """Returns the parameters of all adapters by path, in float32.

    Layers that the adapter leaves out, and ranks beyond its own, are 0 in both matrices: training
    leaves them so.
    """
    checkpoint = _open(cfg)
    shapes = _flat(meta.unbox(abstract_params(cfg)))
    boxes = _flat(abstract_params(checkpoint.cfg))
    params = {}
    for path, shape in shapes.items():
        if is_adapter(tuple(path.split("/"))):
            params[path] = np.zeros(shape.shape, np.float32)
    for adapted in _kernels(checkpoint):
        setting = lora.find_target(cfg.lora, adapted.path)
        lora_a, lora_b = _to_params(adapted, boxes)
        lora_b = lora_b * (adapted.layer.scale / cfg.lora.scale(setting.rank, setting.alpha))
        module, rank = adapted.target.param.rpartition("/")[0], adapted.layer.rank
        all_a, all_b = params[f"{module}/{LORA_A}"], params[f"{module}/{LORA_B}"]
        if adapted.target.layer is not None:
            all_a, all_b = all_a[adapted.target.layer], all_b[adapted.target.layer]
        all_a[..., :rank], all_b[:rank] = lora_a, lora_b
    return params


def _flat(params) -> dict:
    return traverse_util.flatten_dict(params, sep="/")


def _to_params(adapted: Adapted, boxes: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Returns lora_a (inputs, rank) and lora_b (rank, outputs) of a kernel."""
    row, target, layer = adapted.row, adapted.target, adapted.layer
    rank, contracted = layer.rank, boxes[target.param].contracted
    lora_a = layer.lora_a.read().astype(np.float32)
    lora_b = layer.lora_b.read().astype(np.float32)
    if row.stores_inputs_first(contracted):
        lora_a, lora_b = lora_a.T, lora_b.T

    def shape_of(other: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shape = other.shape({other.param: boxes[other.param].value.shape})
        return shape[:contracted], shape[contracted:]

    inputs, outputs = shape_of(target)
    # lora_a has the layout of a kernel whose outputs are the ranks, lora_b of one whose inputs are.
    a_shapes = {target.param: _stacked(target, (*inputs, rank, *[1] * (len(outputs) - 1)))}
    lora_a = replace(row, targets=(target,)).from_hf(lora_a, target, a_shapes)
    b_shapes = {}
    for other in row.targets:
        b_shape = (rank, *[1] * (contracted - 1), *shape_of(other)[1])
        b_shapes[other.param] = _stacked(other, b_shape)
    lora_b = row.from_hf(lora_b, target, b_shapes)
    return lora_a.reshape(*inputs, rank), lora_b.reshape(rank, *outputs)


def _stacked(target: Target, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the parameter, given the shape of a layer."""
    return shape if target.layer is None else (1, *shape)
