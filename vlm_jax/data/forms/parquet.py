"""Parquet files, such as the Hugging Face hub has; images are bytes or paths."""

from collections.abc import Iterator
from pathlib import Path

from pyarrow.parquet import ParquetFile

from vlm_jax.config import DataError
from vlm_jax.data.forms.columns import ROWS_AT_ONCE, known_columns, read_rows, reading

SIGNATURE = b"PAR1"


def recognize(path: Path, head: bytes) -> bool:
    """Returns whether a file begins as a Parquet file."""
    return head.startswith(SIGNATURE)


def read(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields the location and the values of each row.

    Raises:
      DataError: the file is damaged or has no rows.
    """
    with reading(path, "Parquet file"), ParquetFile(path) as file:
        if not file.metadata.num_rows:
            raise DataError(f"{path} has no rows: it has no conversations.")
        columns = known_columns(file.schema_arrow)
        yield from read_rows(file.iter_batches(ROWS_AT_ONCE, columns=columns))
