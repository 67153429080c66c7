"""JSON files of conversations -> records, each checked.

A file holds a list of records, or one record per line (JSON Lines). The content decides which, not the name.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_jax.config import DataError
from vlm_jax.runtime.lfs import refuse_pointer

IMAGE_PLACEHOLDER = "<image>"  # placeholder of an image in a text
SPEAKERS = ("human", "gpt")
DEFAULT_TYPE = "conversation"
REPORTED_RECORDS = 5
RECORD_FORMAT = (
    "'conversations', a list of turns with 'from' and 'value' that alternate between human and gpt, and one path in "
    f"'image' for each {IMAGE_PLACEHOLDER}"
)
BLANK = "\ufeff \t\r\n"  # around records; byte order marks remain where files were concatenated


@dataclass(frozen=True)
class ConversationRecord:
    """A conversation as a file has it: an even number of turns, the human's first."""

    file: int  # number of its file among those read together
    place: str  # in that file, such as "line 3 (id 'a7')"
    id: str
    image_paths: tuple[str, ...]  # in the order of their marks
    turns: tuple[str, ...]
    type: str = DEFAULT_TYPE


class _BadRecord(ValueError):
    """A fault of a record; the message completes "record 'a7' ..."."""


def read_files(files: tuple[str, ...]) -> Iterator[ConversationRecord]:
    """Yields the records of all files, in order.

    Raises:
      DataError: a file cannot be read or has no records (at once), or records are malformed (at the end: the
        message has their number, and the place and the fault of the first few).
    """
    reported, bad, count = [], 0, 0
    for number, file in enumerate(files):
        for index, (place, value) in enumerate(_values(file)):
            count += 1
            try:
                yield ConversationRecord(number, place, *_fields(value, index))
            except _BadRecord as error:
                bad += 1
                if len(reported) < REPORTED_RECORDS:
                    reported.append(f"{file}: {place} {error}")
    if bad:
        more = f"; and {bad - len(reported)} more" if bad > len(reported) else ""
        raise DataError(
            f"{bad} of {count} records are not conversations: {'; '.join(reported)}{more}. A record needs "
            f"{RECORD_FORMAT}."
        )


def _values(file: str) -> Iterator[tuple[str, object]]:
    """Yields the place of each record, such as "line 3", and its JSON value, or the ValueError of parsing it.

    Raises:
      DataError: the file is not text or not JSON, or has no records.
    """
    text = _text(file)
    if not text:
        raise DataError(f"{file} is empty: it holds no conversations.")
    whole = _parsed(text)
    is_list = text.startswith("[")
    if is_list and isinstance(whole, ValueError):
        raise DataError(f"{file} is not valid JSON: {whole}.")
    if is_list and not whole:
        raise DataError(f"{file} is an empty list: it holds no conversations.")
    if isinstance(whole, dict) and "conversations" not in whole:
        raise DataError(
            f"{file} is a single JSON object with the keys {_listed(whole)}, not a list of conversations."
        )
    if is_list:
        yield from ((_place(f"record {index}", value), value) for index, value in enumerate(whole))
    elif isinstance(whole, dict) and "\n" in text:
        yield _place("record 0", whole), whole
    else:
        yield from _lines(file)


def _lines(file: str) -> Iterator[tuple[str, object]]:
    """`_values` of JSON Lines; empty lines are skipped and counted."""
    with open(file, encoding="utf-8") as opened:  # universal newlines
        for number, line in enumerate(opened, 1):
            line = line.strip(BLANK)
            if line:
                value = _parsed(line)
                yield _place(f"line {number}", value), value


def _text(file: str) -> str:
    """Returns the text of a file, without a byte order mark and without blank space around it."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the conversations of {file}: {error.strerror}.") from None
    refuse_pointer(file, content)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file} is not text in UTF-8: line {line} has the byte 0x{content[error.start]:02x}. Save the "
            "file as UTF-8."
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{file} is not text: line {line} has a NUL byte. The file may be damaged.")
    return text.strip(BLANK)


def _parsed(text: str) -> object:
    """Returns the JSON value of a text, or the ValueError that says why it has none."""
    try:
        return json.loads(text)
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return error


def _place(position: str, value: object) -> str:
    """Returns the words that point to a record: its position, and its id where it has one."""
    name = value.get("id") if isinstance(value, dict) else None
    return position if name is None else f"{position} (id {name!r})"


def _fields(value: object, index: int) -> tuple[str, tuple[str, ...], tuple[str, ...], str]:
    """Returns the id of a record (`index` where it has none), its image paths, turns and type.

    Raises:
      _BadRecord: the value is not a conversation in LLaVA's format.
    """
    if isinstance(value, json.JSONDecodeError):
        raise _BadRecord(f"is not valid JSON (column {value.colno}: {value.msg})")
    if isinstance(value, ValueError):
        raise _BadRecord(f"is not valid JSON ({value})")
    if not isinstance(value, dict):
        raise _BadRecord(f"is {_kind(value)}, not an object")
    turns, paths = _turns(value), _image_paths(value)
    marks = sum(turn.count(IMAGE_PLACEHOLDER) for turn in turns)
    if marks != len(paths):
        raise _BadRecord(f"has {len(paths)} images and {marks} marks {IMAGE_PLACEHOLDER} for them")
    if not turns:
        raise _BadRecord("has no turn from human that gpt answers")
    record_type = _checked_text(value.get("type", DEFAULT_TYPE), "'type'")
    name = _checked_text(str(value.get("id", index)), "'id'")
    return name, paths, turns, record_type


def _turns(record: dict) -> tuple[str, ...]:
    """Returns the texts of human and gpt in turn; an answer before the first question and a question without an answer
    are left out."""
    listed = record.get("conversations")
    if not isinstance(listed, list):
        described = (
            f"has the keys {_listed(record)}"
            if listed is None
            else f"has {_kind(listed)} as 'conversations'"
        )
        raise _BadRecord(f"{described}, not a list 'conversations'")
    turns = [_turn(number, turn) for number, turn in enumerate(listed, 1)]
    first = 1 if turns and turns[0][0] == "gpt" else 0
    for number, (speaker, _) in enumerate(turns[first:]):
        expected = SPEAKERS[number % 2]
        if speaker != expected:
            raise _BadRecord(
                f"has a turn from {speaker} where {expected} must follow (turn {first + number + 1}): human and gpt "
                "must alternate"
            )
    pairs = (len(turns) - first) // 2
    return tuple(text for _, text in turns[first : first + 2 * pairs])


def _turn(number: int, turn: object) -> tuple[str, str]:
    """Returns the speaker and the text of a turn, which is counted from 1."""
    if not isinstance(turn, dict):
        raise _BadRecord(
            f"has {_kind(turn)} as turn {number}, not an object with 'from' and 'value'"
        )
    if not {"from", "value"} <= turn.keys():
        raise _BadRecord(
            f"has a turn with the keys {_listed(turn)} (turn {number}), not 'from' and 'value'"
        )
    if turn["from"] not in SPEAKERS:
        raise _BadRecord(
            f"has a turn from {turn['from']!r} (turn {number}): only human and gpt are supported"
        )
    return turn["from"], _checked_text(turn["value"], f"the value of turn {number}")


def _image_paths(record: dict) -> tuple[str, ...]:
    listed = record.get("image") or []
    paths = listed if isinstance(listed, list) else [listed]
    for path in paths:
        if "\0" in _checked_text(path, "'image'"):
            raise _BadRecord("has a NUL character in 'image', which no path has")
    return tuple(Path(path).as_posix() for path in paths)


def _checked_text(value: object, name: str) -> str:
    """Returns a value that is a text in Unicode; `name` says which value of a record it is."""
    if not isinstance(value, str):
        raise _BadRecord(f"has {_kind(value)} as {name}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise _BadRecord(
            f"has half a character, {half!r}, in {name}, which is not text in Unicode"
        ) from None
    return value


def _kind(value: object) -> str:
    """Returns the JSON type of a value in words, with the value where it is short."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "the truth value",
        type(None): "null",
    }
    name = names.get(type(value), "the number")
    return (
        name
        if value is None or isinstance(value, dict | list | str)
        else f"{name} {json.dumps(value)}"
    )


def _listed(record: dict) -> str:
    """Returns the first few keys of an object."""
    keys = [repr(key) for key in record]
    return ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "") if keys else "(none)"
