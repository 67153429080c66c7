"""Rows of Arrow tables as records."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from vlm_jax.config import DataError
from vlm_jax.data.forms.layouts import KEYS
from vlm_jax.data.forms.record import locate

ROWS_AT_ONCE = 64  # converted to Python objects together: they may hold images


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Converts an error of pyarrow for a damaged file to a DataError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{path} is not a readable {kind}: {reason}.") from None


def known_columns(schema: pa.Schema) -> list[str]:
    """Returns the names of the columns that are read; of all columns if there are none.

    A message about a record then names the columns.
    """
    return [name for name in schema.names if name in KEYS] or schema.names


def read_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, dict]]:
    """Yields the location and the values of each row, numbered from 0."""
    index = 0
    for batch in batches:
        # Offsets of a damaged file may lie outside its buffers.
        batch.validate(full=True)
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for values in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                yield locate(f"row {index}", values), values
                index += 1
