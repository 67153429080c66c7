"""Reads and checks the records of files of conversations, each in its own form."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from vlm_jax.config import DataError
from vlm_jax.config.datasets import AUTO, CONVERSATION_FORMATS, ConversationFormat
from vlm_jax.data.forms import layouts
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER, BadRecord, ConversationRecord
from vlm_jax.runtime.lfs import refuse_pointer

REPORTED_RECORDS = 5
HEAD_BYTES = 512  # of a file, from which its form is recognized
RECORD_FORMAT = (
    "turns that alternate between two speakers, as 'from' and 'value' in 'conversations' (human, "
    "gpt) or as 'role' and 'content' in 'messages' (user, assistant), or a question and its "
    f"answer, and one image for each {IMAGE_PLACEHOLDER}"
)


def read_files(files: tuple[str, ...], format_name: str = AUTO) -> Iterator[ConversationRecord]:
    """Yields the records of all files, in order.

    Args:
      files: files, or folders of `datasets.save_to_disk`.
      format_name: a row of CONVERSATION_FORMATS; "auto": the form of each file is recognized.

    Raises:
      DataError: at once if a file cannot be read or has no records; after the last record if
        records are malformed, with their number and the location and fault of the first few.
    """
    reported, bad, count = [], 0, 0
    for file_index, file in enumerate(files):
        for index, (location, value, layout) in enumerate(_values(file, format_name)):
            count += 1
            try:
                if isinstance(value, BadRecord):
                    raise value
                fields = layouts.parse(value, index, layout)
            except BadRecord as error:
                bad += 1
                if len(reported) < REPORTED_RECORDS:
                    reported.append(f"{file}: {location} {error}")
            else:
                yield ConversationRecord(file_index, location, **fields)
    if bad:
        more = f"; and {bad - len(reported)} more" if bad > len(reported) else ""
        raise DataError(
            f"{bad} of {count} records are not conversations: {'; '.join(reported)}{more}. "
            f"A record needs {RECORD_FORMAT}."
        )


def _values(file: str, format_name: str) -> Iterator[tuple[str, object, str]]:
    """Yields the location of each record of a file, its value or its fault, and its layout.

    Raises:
      DataError: the file cannot be read in its form.
    """
    path = Path(file)
    try:
        row = _find_format(path, format_name)
        for location, value in _module(row).read(path):
            yield location, value, row.layout
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot read the conversations of {file}: {reason}.") from None


def _find_format(path: Path, format_name: str) -> ConversationFormat:
    """Returns the format that is named, or the first that recognizes a file."""
    head = b""
    if not path.is_dir():
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        refuse_pointer(path, head)
    if format_name != AUTO:
        return CONVERSATION_FORMATS[format_name]
    # The last of them, json, takes every file.
    candidates = [row for row in CONVERSATION_FORMATS.values() if not row.layout]
    return next(row for row in candidates if _module(row).recognize(path, head))


def _module(row: ConversationFormat) -> ModuleType:
    return importlib.import_module(row.module)
