"""Merges an adapter into the tensors of its base model, in the layout of the model's files.

The weight tables of the families then load the merged tensors like any others, so that an adapter
of any module of any family needs no rows of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from vlm_jax import axes
from vlm_jax.config import CheckpointError
from vlm_jax.hub.families.family import Family
from vlm_jax.hub.families.table import Row
from vlm_jax.hub.peft.adapter import Adapter, LoraLayer
from vlm_jax.hub.tensors.folder import list_tensors
from vlm_jax.hub.tensors.mapped import StoredTensor, tensors_equal


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
      stored: tensors by their names in the table, which `check_base` has compared.
    """
    row_of = {row.tensor: row for row in rows}
    merged = dict(stored)
    for name, name_in_file in family.normalize_names(adapter.saved).items():
        merged[name] = adapter.saved[name_in_file]
    for name, name_in_file in family.normalize_names(adapter.layers).items():
        is_transposed = _stores_inputs_first(row_of[name], boxes)
        merged[name] = MergedTensor(merged[name], adapter.layers[name_in_file], is_transposed)
    return merged


def check_base(
    adapter: Adapter,
    family: Family,
    rows: list[Row],
    boxes: Mapping[str, axes.Partitioned],
    stored: Mapping[str, StoredTensor],
) -> Adapter:
    """Returns the adapter without saved copies of unchanged tensors; takes the args of `merge`.

    Raises:
      CheckpointError: the adapter belongs to another model, or changes an embedding that is the
        output head, too.
    """
    row_of = {row.tensor: row for row in rows}
    problems, saved = [], {}
    for name, name_in_file in family.normalize_names(adapter.saved).items():
        tensor = adapter.saved[name_in_file]
        if name not in stored or tensor.shape != stored[name].shape:
            problems.append(_problem(name_in_file, tensor.shape, stored.get(name)))
        elif not tensors_equal(tensor, stored[name]):
            _reject_tied(adapter, row_of[name], boxes)
            saved[name_in_file] = tensor
    for name, name_in_file in family.normalize_names(adapter.layers).items():
        shape = adapter.layers[name_in_file].shape
        if name in stored:
            _reject_tied(adapter, row_of[name], boxes)
            if _stores_inputs_first(row_of[name], boxes):
                shape = shape[::-1]
        if name not in stored or shape != stored[name].shape:
            problems.append(_problem(name_in_file, shape, stored.get(name)))
    if problems:
        raise CheckpointError(
            f"adapter {adapter.folder} belongs to another model: {list_tensors(problems)}."
        )
    return replace(adapter, saved=saved)


def _stores_inputs_first(row: Row, boxes: Mapping[str, axes.Partitioned]) -> bool:
    """Returns whether the tensor of a row is the transpose of torch's Linear, as in a Conv1D."""
    return row.stores_inputs_first(boxes[row.targets[0].param].contracted)


def _problem(name: str, shape: tuple[int, ...], base: StoredTensor | None) -> str:
    if base is None:
        return f"{name} is unknown"
    return f"{name} has the shape {shape}, not {base.shape}"


def _reject_tied(adapter: Adapter, row: Row, boxes: Mapping[str, axes.Partitioned]) -> None:
    """Raises CheckpointError for an embedding whose table is the output head, too.

    In PEFT one of them is changed, so that they differ.
    """
    param = row.targets[0].param
    is_embedding = param in ("decoder/embedding/table", "decoder/added_embedding/table")
    if is_embedding and "decoder/free_head/kernel" not in boxes:
        raise CheckpointError(
            f"adapter {adapter.folder} changes {row.tensor}, which is the output head of this "
            "model, too: that is not supported."
        )
