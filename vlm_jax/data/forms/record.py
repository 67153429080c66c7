"""The record that every form of conversations becomes, and checks of the values it is made of."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

IMAGE_PLACEHOLDER = "<image>"  # of an image in a text
DEFAULT_TYPE = "conversation"
REPORTED_KEYS = 8


@dataclass(frozen=True)
class ConversationRecord:
    """A conversation of a file: an even number of turns, the user first."""

    file: int  # index of its file among the files read together
    location: str  # in the file, such as "line 3 (id 'a7')"
    id: str
    #: in the order of their placeholders: the path of an image file, or its content
    images: tuple[str | bytes, ...]
    turns: tuple[str, ...]
    type: str = DEFAULT_TYPE
    system: str | None = None  # text of the system turn
    # Of each question, in evaluation; empty: the record has none.
    answers: tuple[tuple[str, ...], ...] = ()  # references, instead of the answer in `turns`
    choices: tuple[tuple[str, ...], ...] = ()


class BadRecord(ValueError):
    """A fault of a record; the message completes "line 3 (id 'a7') ..."."""


def locate(position: str, record: object) -> str:
    """Returns the position of a record, followed by its id if it has one."""
    name = record.get("id") if isinstance(record, dict) else None
    return position if name is None else f"{position} (id {name!r})"


def check_text(value: object, name: str) -> str:
    """Returns a value that is valid Unicode text; `name` is the value's in messages."""
    if not isinstance(value, str):
        raise BadRecord(f"has {describe(value)} as {name}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise BadRecord(
            f"has half a surrogate pair, {half!r}, in {name}, which is not valid Unicode"
        ) from None
    return value


def describe(value: object) -> str:
    """Returns the JSON type of a value in words, with the value if it is short."""
    match value:
        case dict():
            return "an object"
        case list():
            return "a list"
        case str():
            return "a text"
        case bytes():
            return "bytes"
        case None:
            return "null"
        case bool():
            return f"the truth value {json.dumps(value)}"
        case int() | float():
            return f"the number {json.dumps(value)}"
    return f"a {type(value).__name__}"


def list_keys(keys: Iterable[str]) -> str:
    """Returns the first few keys of an object."""
    names = [repr(key) for key in keys]
    if not names:
        return "(none)"
    more = ", ..." if len(names) > REPORTED_KEYS else ""
    return ", ".join(names[:REPORTED_KEYS]) + more
