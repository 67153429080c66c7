"""Merges an adapter into the tensors of its base model, in the layout of the model's files.

The weight tables of the families then load the merged tensors like any others, so that an adapter
of any module of any family needs no rows of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlm_jax import axes
from vlm_jax.config import CheckpointError
from vlm_jax.hub.families.family import Family
from vlm_jax.hub.families.table import Row
from vlm_jax.hub.peft.adapter import Adapter, LoraLayer
from vlm_jax.hub.tensors.mapped import StoredTensor

MAX_LISTED = 3  # tensors that do not fit, in one line


@dataclass(frozen=True, eq=False)
class MergedTensor:
    """A `StoredTensor` and its adapter, which is added in float32 whenever it is read."""

    base: StoredTensor
    layer: LoraLayer
    is_transposed: bool  # the file has the inputs first

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def read(self) -> np.ndarray:
        product = self.layer.product()
        return self.base.read() + (product.T if self.is_transposed else product)

    def release(self) -> None:
        self.base.release()


def merge(
    adapter: Adapter,
    family: Family,
    rows: list[Row],
    boxes: Mapping[str, axes.Partitioned],
    stored: Mapping[str, StoredTensor],
) -> dict[str, StoredTensor | MergedTensor]:
    """Returns the tensors of a checkpoint, by their names in the table, with the adapter.

    Args:
      rows: weight table of the checkpoint.
      boxes: path -> shape and logical axes of the parameters.
      stored: tensors by their names in the table.

    Raises:
      CheckpointError: the adapter belongs to another model, or replaces a tied embedding.
    """
    names = family.normalize_names([*adapter.layers, *adapter.saved])
    row_of = {row.tensor: row for row in rows}
    merged = dict(stored)
    problems = []
    for name, name_in_file in names.items():
        if name not in stored:
            problems.append(f"{name_in_file} is unknown")
            continue
        if name_in_file in adapter.saved:
            merged[name] = adapter.saved[name_in_file]
            shape = merged[name].shape
        else:
            merged[name] = _merged(stored[name], adapter.layers[name_in_file], row_of[name], boxes)
            shape = _shape(merged[name])
        if shape != stored[name].shape:
            problems.append(f"{name_in_file} has the shape {shape}, not {stored[name].shape}")
    if problems:
        more = f" and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointError(
            f"adapter {adapter.folder} belongs to another model: "
            f"{'; '.join(problems[:MAX_LISTED])}{more}."
        )
    _reject_tied(adapter, row_of, names, boxes)
    return merged


def _merged(
    base: StoredTensor, layer: LoraLayer, row: Row, boxes: Mapping[str, axes.Partitioned]
) -> MergedTensor:
    contracted = boxes[row.targets[0].param].contracted
    return MergedTensor(base, layer, row.stores_inputs_first(contracted))


def _shape(tensor: MergedTensor) -> tuple[int, ...]:
    """Shape of the adapter in the layout of the file."""
    shape = tensor.layer.shape
    return shape[::-1] if tensor.is_transposed else shape


def _reject_tied(
    adapter: Adapter,
    row_of: Mapping[str, Row],
    names: Mapping[str, str],
    boxes: Mapping[str, axes.Partitioned],
) -> None:
    """Raises CheckpointError for a saved embedding whose table is the output head, too.

    In PEFT the copy of one of them is trained, so that they differ.
    """
    if "decoder/free_head/kernel" in boxes:
        return
    for name, name_in_file in names.items():
        if row_of[name].targets[0].param == "decoder/embedding/table":
            raise CheckpointError(
                f"adapter {adapter.folder} changes {name_in_file}, which is the output head of "
                "this model, too: that is not supported."
            )
