"""JSON: a list of records, or one record per line (JSON Lines). The content decides which."""

import json
from collections.abc import Iterator
from pathlib import Path

from vlm_jax.config import DataError
from vlm_jax.data.forms.layouts import ANSWER_KEYS, TURN_LISTS
from vlm_jax.data.forms.record import BadRecord, list_keys, locate
from vlm_jax.data.forms.text_files import BLANK, read_text


def recognize(path: Path, head: bytes) -> bool:
    """Returns True: other forms are recognized first, and text has no signature."""
    return True


def read(path: Path) -> Iterator[tuple[str, object]]:
    """Yields the location of each record, and its JSON value or the `BadRecord` of parsing it.

    Raises:
      DataError: the file is not text or not JSON, or has no records.
    """
    text = read_text(path).strip(BLANK)
    whole = _parse(text)
    is_list = text.startswith("[")
    if is_list and isinstance(whole, ValueError):
        raise DataError(f"{path} is not valid JSON: {whole}.")
    if is_list and not whole:
        raise DataError(f"{path} is an empty list: it has no conversations.")
    if isinstance(whole, dict) and not whole.keys() & {*TURN_LISTS, *ANSWER_KEYS}:
        raise DataError(
            f"{path} is a single JSON object with the keys {list_keys(whole)}, not a list of "
            "conversations."
        )
    if is_list:
        for index, value in enumerate(whole):
            yield locate(f"record {index}", value), value
    elif isinstance(whole, dict) and "\n" in text:
        yield locate("record 0", whole), whole
    else:
        yield from _lines(path)


def _lines(path: Path) -> Iterator[tuple[str, object]]:
    """Yields the records of JSON Lines; empty lines are skipped but counted."""
    with open(path, encoding="utf-8") as lines:  # universal newlines
        for number, line in enumerate(lines, 1):
            line = line.strip(BLANK)
            if line:
                value = _parse(line)
                yield locate(f"line {number}", value), _as_bad_record(value)


def _parse(text: str) -> object:
    """Returns the JSON value of a text, or the ValueError of parsing it."""
    try:
        return json.loads(text)
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return error


def _as_bad_record(value: object) -> object:
    """Converts an error of `_parse` to a fault of a record."""
    match value:
        case json.JSONDecodeError():
            return BadRecord(f"is not valid JSON (column {value.colno}: {value.msg})")
        case ValueError():
            return BadRecord(f"is not valid JSON ({value})")
    return value
