"""Reads and checks the records of JSON files of conversations.

A file holds a list of records, or one record per line (JSON Lines). Its content decides which, not
its name.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_jax.config import DataError
from vlm_jax.runtime.lfs import refuse_pointer

IMAGE_PLACEHOLDER = "<image>"  # of an image in a text
SPEAKERS = ("human", "gpt")
DEFAULT_TYPE = "conversation"
REPORTED_RECORDS = 5
REPORTED_KEYS = 8
RECORD_FORMAT = (
    "'conversations', a list of turns with 'from' and 'value' that alternate between human and "
    f"gpt, and one path in 'image' for each {IMAGE_PLACEHOLDER}"
)
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Around records. Concatenated files have byte order marks between them.
BLANK = "\ufeff \t\r\n"


@dataclass(frozen=True)
class ConversationRecord:
    """A conversation of a file: an even number of turns, the human first."""

    file: int  # index of its file among the files read together
    location: str  # in the file, such as "line 3 (id 'a7')"
    id: str
    image_paths: tuple[str, ...]  # in the order of their placeholders
    turns: tuple[str, ...]
    type: str = DEFAULT_TYPE
    # Of each question, in evaluation; empty: the record has none.
    answers: tuple[tuple[str, ...], ...] = ()  # references, instead of the answer in `turns`
    choices: tuple[tuple[str, ...], ...] = ()


class _BadRecord(ValueError):
    """A fault of a record; the message completes "line 3 (id 'a7') ..."."""


def read_files(files: tuple[str, ...]) -> Iterator[ConversationRecord]:
    """Yields the records of all files, in order.

    Raises:
      DataError: at once if a file cannot be read or has no records; after the last record if
        records are malformed, with their number and the location and fault of the first few.
    """
    reported, bad, count = [], 0, 0
    for file_index, file in enumerate(files):
        for index, (location, value) in enumerate(_values(file)):
            count += 1
            try:
                yield ConversationRecord(file_index, location, *_fields(value, index))
            except _BadRecord as error:
                bad += 1
                if len(reported) < REPORTED_RECORDS:
                    reported.append(f"{file}: {location} {error}")
    if bad:
        more = f"; and {bad - len(reported)} more" if bad > len(reported) else ""
        raise DataError(
            f"{bad} of {count} records are not conversations: {'; '.join(reported)}{more}. "
            f"A record needs {RECORD_FORMAT}."
        )


def _values(file: str) -> Iterator[tuple[str, object]]:
    """Yields the location of each record, and its JSON value or the ValueError of parsing it.

    Raises:
      DataError: the file is not text or not JSON, or has no records.
    """
    text = _text(file)
    if not text:
        raise DataError(f"{file} is empty: it has no conversations.")
    whole = _parse(text)
    is_list = text.startswith("[")
    if is_list and isinstance(whole, ValueError):
        raise DataError(f"{file} is not valid JSON: {whole}.")
    if is_list and not whole:
        raise DataError(f"{file} is an empty list: it has no conversations.")
    if isinstance(whole, dict) and "conversations" not in whole:
        raise DataError(
            f"{file} is a single JSON object with the keys {_list_keys(whole)}, not a list of "
            "conversations."
        )
    if is_list:
        for index, value in enumerate(whole):
            yield _location(f"record {index}", value), value
    elif isinstance(whole, dict) and "\n" in text:
        yield _location("record 0", whole), whole
    else:
        yield from _lines(file)


def _lines(file: str) -> Iterator[tuple[str, object]]:
    """Yields `_values` of JSON Lines; empty lines are skipped but counted."""
    with open(file, encoding="utf-8") as lines:  # universal newlines
        for number, line in enumerate(lines, 1):
            line = line.strip(BLANK)
            if line:
                value = _parse(line)
                yield _location(f"line {number}", value), value


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
        if b"\0" in content and not content.startswith(UTF_16):
            raise DataError(f"{file} is not a text file: it may be compressed.") from None
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file} is not text in UTF-8: line {line} has the byte 0x{content[error.start]:02x}. "
            "Save the file as UTF-8."
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{file} is not text: line {line} has a NUL byte. The file may be damaged.")
    return text.strip(BLANK)


def _parse(text: str) -> object:
    """Returns the JSON value of a text, or the ValueError of parsing it."""
    try:
        return json.loads(text)
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return error


def _location(position: str, value: object) -> str:
    """Returns the position of a record, followed by its id if it has one."""
    name = value.get("id") if isinstance(value, dict) else None
    return position if name is None else f"{position} (id {name!r})"


def _fields(value: object, index: int) -> tuple:
    """Returns the fields of a record from its id on, which is `index` if it has none.

    Raises:
      _BadRecord: the value is not a conversation in LLaVA's format.
    """
    if isinstance(value, json.JSONDecodeError):
        raise _BadRecord(f"is not valid JSON (column {value.colno}: {value.msg})")
    if isinstance(value, ValueError):
        raise _BadRecord(f"is not valid JSON ({value})")
    if not isinstance(value, dict):
        raise _BadRecord(f"is {_json_type(value)}, not an object")
    turns = _turns(value)
    paths = _image_paths(value)
    placeholders = sum(turn.count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders != len(paths):
        raise _BadRecord(
            f"has {len(paths)} images but {placeholders} {IMAGE_PLACEHOLDER} placeholders"
        )
    if not turns:
        raise _BadRecord("has no turn from human that gpt answers")
    record_type = _check_text(value.get("type", DEFAULT_TYPE), "'type'")
    record_id = _check_text(str(value.get("id", index)), "'id'")
    answers = _texts_per_question(value, "answers", len(turns) // 2)
    choices = _texts_per_question(value, "choices", len(turns) // 2)
    return record_id, paths, turns, record_type, answers, choices


def _turns(record: dict) -> tuple[str, ...]:
    """Returns the texts of human and gpt in turn.

    An answer before the first question and a question without an answer are left out.
    """
    values = record.get("conversations")
    if values is None:
        raise _BadRecord(f"has the keys {_list_keys(record)}, not a list 'conversations'")
    if not isinstance(values, list):
        raise _BadRecord(f"has {_json_type(values)} as 'conversations', not a list")
    turns = [_turn(number, value) for number, value in enumerate(values, 1)]
    first = 1 if turns and turns[0][0] == "gpt" else 0
    for number, (speaker, _) in enumerate(turns[first:]):
        expected = SPEAKERS[number % 2]
        if speaker != expected:
            raise _BadRecord(
                f"has a turn from {speaker} where {expected} must follow "
                f"(turn {first + number + 1}): human and gpt must alternate"
            )
    pairs = (len(turns) - first) // 2
    return tuple(text for _, text in turns[first : first + 2 * pairs])


def _turn(number: int, turn: object) -> tuple[str, str]:
    """Returns the speaker and the text of a turn; `number` counts from 1."""
    if not isinstance(turn, dict):
        raise _BadRecord(
            f"has {_json_type(turn)} as turn {number}, not an object with 'from' and 'value'"
        )
    if not {"from", "value"} <= turn.keys():
        raise _BadRecord(
            f"has a turn with the keys {_list_keys(turn)} (turn {number}), not 'from' and 'value'"
        )
    if turn["from"] not in SPEAKERS:
        raise _BadRecord(
            f"has a turn from {turn['from']!r} (turn {number}): only human and gpt are supported"
        )
    return turn["from"], _check_text(turn["value"], f"the value of turn {number}")


def _image_paths(record: dict) -> tuple[str, ...]:
    """Returns the paths of 'image', which is a path, a list of paths, or absent."""
    value = record.get("image") or []
    paths = value if isinstance(value, list) else [value]
    for path in paths:
        if "\0" in _check_text(path, "'image'"):
            raise _BadRecord("has a NUL character in 'image', which no path has")
    return tuple(Path(path).as_posix() for path in paths)


def _texts_per_question(record: dict, key: str, questions: int) -> tuple[tuple[str, ...], ...]:
    """Returns the texts of each question, which a record of one question may have as a flat list.

    Empty if the record has none.
    """
    value = record.get(key)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _BadRecord(f"has {_json_type(value)} as '{key}', not a list")
    is_nested = bool(value) and all(isinstance(texts, list) for texts in value)
    lists = value if is_nested else [value]
    if len(lists) != questions:
        raise _BadRecord(
            f"has {len(lists)} list(s) of '{key}' for {questions} question(s), not one for each"
        )
    checked = []
    for texts in lists:
        checked.append(tuple(_check_text(text, f"an element of '{key}'") for text in texts))
    return tuple(checked)


def _check_text(value: object, name: str) -> str:
    """Returns a value that is valid Unicode text; `name` is the value's in messages."""
    if not isinstance(value, str):
        raise _BadRecord(f"has {_json_type(value)} as {name}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise _BadRecord(
            f"has half a surrogate pair, {half!r}, in {name}, which is not valid Unicode"
        ) from None
    return value


def _json_type(value: object) -> str:
    """Returns the JSON type of a value in words, with the value if it is short."""
    match value:
        case dict():
            return "an object"
        case list():
            return "a list"
        case str():
            return "a text"
        case None:
            return "null"
        case bool():
            return f"the truth value {json.dumps(value)}"
    return f"the number {json.dumps(value)}"


def _list_keys(record: dict) -> str:
    """Returns the first few keys of an object."""
    if not record:
        return "(none)"
    keys = ", ".join(repr(key) for key in list(record)[:REPORTED_KEYS])
    return f"{keys}, ..." if len(record) > REPORTED_KEYS else keys
