"""CSV and TSV: a line of column names, then one question with its image and answer per row."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from vlm_jax.config import DataError
from vlm_jax.data.forms.layouts import ANSWER_KEYS
from vlm_jax.data.forms.record import BadRecord, list_keys, locate
from vlm_jax.data.forms.text_files import read_text

BYTE_ORDER_MARK = "\ufeff"
DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
DELIMITER_NAMES = {",": "commas", "\t": "tabs"}

# The default, 131,072 characters, is too short for a page or an image as a data URL.
csv.field_size_limit(2**31 - 1)


def recognize(path: Path, head: bytes) -> bool:
    """Returns whether a file has the suffix of a table: text has no signature."""
    return path.suffix.lower() in DELIMITERS


def read(path: Path) -> Iterator[tuple[str, dict | BadRecord]]:
    """Yields the location of each row and its cells by column; an empty cell is None.

    Raises:
      DataError: the file is not text, its quotes do not match, or it has no column of answers or no
        rows.
    """
    delimiter = DELIMITERS.get(path.suffix.lower(), ",")
    text = io.StringIO(read_text(path).removeprefix(BYTE_ORDER_MARK), newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    first_line, count = 1, 0
    columns: list[str] = []
    try:
        for cells in rows:
            location, first_line = f"line {first_line}", rows.line_num + 1
            if not cells:
                continue
            if not columns:
                columns = _check_columns(path, delimiter, [cell.strip() for cell in cells])
                continue
            count += 1
            record = _record(columns, cells)
            yield locate(location, record), record
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num} is not valid CSV: {error}.") from None
    if not count:
        raise DataError(f"{path} has column names but no rows: it has no conversations.")


def _check_columns(path: Path, delimiter: str, columns: list[str]) -> list[str]:
    repeated = [name for name in columns if columns.count(name) > 1]
    if repeated:
        raise DataError(f"{path} has two columns {repeated[0]!r}: rename one of them.")
    if not set(columns) & set(ANSWER_KEYS):
        raise DataError(
            f"{path} has the columns {list_keys(columns)}, separated by "
            f"{DELIMITER_NAMES[delimiter]}: it needs an answer, in a column "
            f"{', '.join(ANSWER_KEYS)}."
        )
    return columns


def _record(columns: list[str], cells: list[str]) -> dict | BadRecord:
    if len(cells) != len(columns):
        return BadRecord(f"has {len(cells)} cells for {len(columns)} columns")
    return {name: cell or None for name, cell in zip(columns, cells)}
