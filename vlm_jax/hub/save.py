"""Writes a model as config.json, with the keys of transformers 4.x, and safetensors."""

import json
import os
from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util

from vlm_jax.hub.families.family import Config, Family
from vlm_jax.hub.families.table import Row
from vlm_jax.hub.load import param_shapes
from vlm_jax.hub.tensors.folder import all_or_none, write_tensors

MAX_SHARD_BYTES = 5_000_000_000


class Spec:
    """Shape and dtype of a tensor that is written later."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, np.dtype(dtype)


def write_model(
    folder: str | os.PathLike,
    family: Family,
    cfg: Config,
    params: Mapping,
    config: Mapping | None = None,
    dtypes: Mapping[str, np.dtype] | None = None,
) -> None:
    """Writes config.json and the weights, all or nothing.

    Args:
      config: further keys of config.json; the family's own keys take precedence.
      dtypes: by tensor name; the other tensors have the dtype of their parameters.

    Raises:
      CheckpointError: the folder cannot be written or holds weights already.
    """
    flat_params = traverse_util.flatten_dict(params, sep="/")
    shapes, dtypes = param_shapes(cfg), dtypes or {}
    rows = {row.tensor: row for row in family.param_table(cfg)}
    specs = {}
    for name, row in rows.items():
        dtype = dtypes.get(name, flat_params[row.targets[0].param].dtype)
        specs[name] = Spec(row.stored_shape(shapes), dtype)
    config_text = json.dumps(merge(config or {}, family.config_to_hf(cfg)), indent=2) + "\n"

    def read(name):
        return _to_hf(rows[name], flat_params, specs[name].dtype)

    with all_or_none(folder) as stage:
        write_tensors(stage, specs, read, MAX_SHARD_BYTES, family.weights_file)
        (stage / family.config_file).write_text(config_text)


def merge(old: Mapping, new: Mapping) -> dict:
    """Merges nested mappings; a key of both has the new value."""
    merged = dict(old)
    for key, value in new.items():
        is_nested = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = merge(old[key], value) if is_nested else value
    return merged


def _to_hf(row: Row, params: Mapping, dtype: np.dtype) -> np.ndarray:
    """Builds one tensor of the file; of a stacked parameter, only one layer leaves the device."""
    arrays = []
    for target in row.targets:
        array = params[target.param]
        array = array if target.layer is None else array[target.layer]
        arrays.append(np.asarray(jax.device_get(array)))
    return row.to_hf(arrays).astype(dtype)
