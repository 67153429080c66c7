"""A model -> a folder that transformers loads: hub names, a config of transformers 4.x, safetensors."""

import json
import os
from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util

from vlm_jax.hub.families.family import Config, Family
from vlm_jax.hub.families.table import Row
from vlm_jax.hub.load import shapes_of
from vlm_jax.hub.tensors.folder import all_or_none, write_tensors

MAX_SHARD_BYTES = 5_000_000_000


class Spec:
    """Shape and dtype of a tensor that is not made yet."""

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
      config: keys of config.json that the family does not know, kept beside those that it writes.
      dtypes: of the stored tensors by name; the others as the parameters are.

    Raises:
      CheckpointError: the folder cannot be written or holds weights already.
    """
    flat, shapes = traverse_util.flatten_dict(params, sep="/"), shapes_of(cfg)
    rows = {row.tensor: row for row in family.param_table(cfg)}
    specs = {
        name: Spec(
            row.stored_shape(shapes), (dtypes or {}).get(name, flat[row.targets[0].param].dtype)
        )
        for name, row in rows.items()
    }
    text = json.dumps(merged(config or {}, family.config_to_hf(cfg)), indent=2) + "\n"

    def read(name):
        return _stored(rows[name], flat, specs[name].dtype)

    with all_or_none(folder) as stage:
        write_tensors(stage, specs, read, MAX_SHARD_BYTES, family.weights_file)
        (stage / family.config_file).write_text(text)


def merged(old: Mapping, new: Mapping) -> dict:
    """The keys of both, nested ones too; where both have one, the new value."""
    both = {
        key: merged(old[key], x) if isinstance(x, dict) and isinstance(old.get(key), dict) else x
        for key, x in new.items()
    }
    return {**old, **both}


def _stored(row: Row, flat: Mapping, dtype: np.dtype) -> np.ndarray:
    """A stored tensor from the parameters; of a stacked one, only the slice of its layer leaves the device."""
    parts = [
        flat[part.param] if part.layer is None else flat[part.param][part.layer]
        for part in row.targets
    ]
    return row.to_hf([np.asarray(jax.device_get(x)) for x in parts]).astype(dtype)
