"""Layouts of a record: the keys that hold its turns, images and references, in any file.

    conversations   a list of {"from": "human" | "gpt" | "system", "value": text}
    messages        a list of {"role": "user" | "assistant" | "system", "content": text or parts}
    question        the keys "question" and "answer", or others of QUESTION_KEYS and ANSWER_KEYS

A part of a content is {"type": "text", "text": ...}, {"type": "image", ...} or {"type":
"image_url", "image_url": {"url": ...}}; an image part without a source is the next of the record's
images.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from vlm_jax.data.forms.image_values import read_images, read_part
from vlm_jax.data.forms.record import (
    DEFAULT_TYPE,
    IMAGE_PLACEHOLDER,
    BadRecord,
    check_text,
    describe,
    list_keys,
)

# Of several keys of a record, the first one that has a value.
QUESTION_KEYS = ("question", "query", "prompt")
ANSWER_KEYS = ("answer", "answers", "response", "caption", "label")
IMAGE_KEYS = ("image", "images")
FILE_KEYS = ("image_path", "file_name")  # of an image, beside a question
REFERENCE_KEYS = ("references", "answers")  # of each question, in evaluation
# A record with a value for one of them needs more than text and images.
UNSUPPORTED_KEYS = ("video", "videos", "audio", "audios", "tools")
UNSUPPORTED_TURN_KEYS = ("tool_calls", "function_call", "audio", "reasoning_content", "thinking")
# Parts of a question in other programs (Alpaca, ms-swift).
UNSUPPORTED_QUESTION_KEYS = ("history", "instruction", "input")
# Share of an answer in the loss in other programs (OpenAI, ms-swift, axolotl).
LOSS_KEYS = ("weight", "loss", "train")


@dataclass(frozen=True)
class TurnList:
    """A list of turns: its key in a record, the keys of a turn, and the speakers.

    Attributes:
      speakers: name of a speaker -> "user", "assistant" or "system".
      shown: the two speakers that alternate, in messages.
      has_parts: the text of a turn may be a list of parts.
    """

    key: str
    speaker: str
    text: str
    speakers: Mapping[str, str]
    shown: tuple[str, str]
    has_parts: bool = False


ROLES = {"user": "user", "assistant": "assistant", "system": "system"}
TURN_LISTS = {
    "conversations": TurnList(
        "conversations", "from", "value", ROLES | {"human": "user", "gpt": "assistant"},
        ("human", "gpt"),
    ),
    "messages": TurnList(
        "messages", "role", "content", ROLES, ("user", "assistant"), has_parts=True
    ),
}  # fmt: skip
LAYOUTS = (*TURN_LISTS, "question")
# All keys of a record that are read; a reader of columns needs no others.
KEYS = (
    *TURN_LISTS,
    *QUESTION_KEYS,
    *ANSWER_KEYS,
    *IMAGE_KEYS,
    *FILE_KEYS,
    *REFERENCE_KEYS,
    *UNSUPPORTED_KEYS,
    *UNSUPPORTED_QUESTION_KEYS,
    *("id", "type", "system", "choices"),
)


def parse(record: object, index: int, layout: str = "") -> dict:
    """Returns the fields of a `ConversationRecord`, except its file and location.

    Args:
      record: a JSON value; images may be bytes.
      index: its id if it has none.
      layout: one of LAYOUTS; "": the one that the record's keys have.

    Raises:
      BadRecord: the value is not a conversation.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"is {describe(record)}, not an object")
    for key in UNSUPPORTED_KEYS:
        if record.get(key):
            raise BadRecord(f"has {key!r}, which is not supported: only text and images are")
    layout = layout or _find_layout(record)
    if layout == "question":
        fields = _parse_question(record)
    else:
        fields = _parse_turns(TURN_LISTS[layout], record)
    if IMAGE_PLACEHOLDER in (fields["system"] or ""):
        raise BadRecord(f"has {IMAGE_PLACEHOLDER} in its system turn, where no image can be")
    texts = fields["turns"]
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    images = len(fields["images"])
    if placeholders != images:
        raise BadRecord(f"has {images} images but {placeholders} {IMAGE_PLACEHOLDER} placeholders")
    record_id = index if record.get("id") is None else record["id"]
    record_type = DEFAULT_TYPE if record.get("type") is None else record["type"]
    return fields | {
        "id": check_text(str(record_id), "'id'"),
        "type": check_text(record_type, "'type'"),
        "choices": _texts_per_question(record, "choices", len(texts) // 2),
    }


def _find_layout(record: dict) -> str:
    present = [key for key in TURN_LISTS if record.get(key) is not None]
    if len(present) > 1:
        raise BadRecord(f"has both {' and '.join(map(repr, present))}: keep one of them")
    if present:
        return present[0]
    if any(key in record for key in ANSWER_KEYS):
        return "question"
    raise BadRecord(
        f"has the keys {list_keys(record)}, not a list 'conversations' or 'messages', or "
        "'question' and 'answer'"
    )


def _first_key(record: dict, keys: tuple[str, ...]) -> str | None:
    """Returns the first of the keys that the record has a value for."""
    return next((key for key in keys if record.get(key) not in (None, "", [])), None)


def _parse_turns(layout: TurnList, record: dict) -> dict:
    values = record.get(layout.key)
    if values is None:
        raise BadRecord(f"has the keys {list_keys(record)}, not a list {layout.key!r}")
    values = _rows_of_columns(values)
    if not isinstance(values, list):
        raise BadRecord(f"has {describe(values)} as {layout.key!r}, not a list")
    images = _ImageList(_record_images(record, IMAGE_KEYS))
    turns = [_turn(layout, number, value, images) for number, value in enumerate(values, 1)]
    system = _system(record)
    if turns and layout.speakers[turns[0][0]] == "system":
        if system is not None:
            raise BadRecord("has a system turn and 'system': keep one of them")
        system, skipped = turns[0][1], 1
    else:
        skipped = 0
    texts = _alternating(layout, turns, skipped)
    reference_key = _first_key(record, REFERENCE_KEYS)
    answers = _texts_per_question(record, reference_key, len(texts) // 2)
    return {"turns": texts, "images": images.all(), "system": system, "answers": answers}


def _system(record: dict) -> str | None:
    """Returns the text of the key 'system', which some files have instead of a system turn."""
    text = record.get("system")
    return None if text in (None, "") else check_text(text, "'system'")


def _rows_of_columns(values: object) -> object:
    """Converts {"from": [...], "value": [...]}, a list of structs in some Parquet files."""
    if not isinstance(values, dict) or not all(isinstance(v, list) for v in values.values()):
        return values
    if len(set(map(len, values.values()))) != 1:
        return values
    return [dict(zip(values, row)) for row in zip(*values.values())]


def _alternating(layout: TurnList, turns: list[tuple[str, str]], skipped: int) -> tuple[str, ...]:
    """Returns the texts of user and assistant in turn, after `skipped` turns.

    An answer before the first question and a question without an answer are left out.
    """
    if len(turns) > skipped and layout.speakers[turns[skipped][0]] == "assistant":
        skipped += 1
    for number, (speaker, _) in enumerate(turns[skipped:]):
        expected = ("user", "assistant")[number % 2]
        if layout.speakers[speaker] != expected:
            user, assistant = layout.shown
            raise BadRecord(
                f"has a turn from {speaker} where {layout.shown[number % 2]} must follow "
                f"(turn {skipped + number + 1}): {user} and {assistant} must alternate"
            )
    pairs = (len(turns) - skipped) // 2
    if not pairs:
        user, assistant = layout.shown
        raise BadRecord(f"has no turn from {user} that {assistant} answers")
    return tuple(text for _, text in turns[skipped : skipped + 2 * pairs])


def _turn(layout: TurnList, number: int, turn: object, images: "_ImageList") -> tuple[str, str]:
    """Returns the speaker and the text of a turn; `number` counts from 1."""
    speaker_key, text_key = layout.speaker, layout.text
    if not isinstance(turn, dict):
        raise BadRecord(
            f"has {describe(turn)} as turn {number}, not an object with {speaker_key!r} and "
            f"{text_key!r}"
        )
    for key in UNSUPPORTED_TURN_KEYS:
        if turn.get(key):
            raise BadRecord(f"has {key!r} in turn {number}, which is not supported")
    if not {speaker_key, text_key} <= turn.keys():
        raise BadRecord(
            f"has a turn with the keys {list_keys(turn)} (turn {number}), not {speaker_key!r} and "
            f"{text_key!r}"
        )
    speaker, text = turn[speaker_key], turn[text_key]
    if not isinstance(speaker, str) or speaker not in layout.speakers:
        raise BadRecord(
            f"has a turn from {speaker!r} (turn {number}): only {', '.join(layout.speakers)} are "
            "supported"
        )
    if layout.speakers[speaker] == "assistant":
        _check_loss(turn, number)
    name = f"the {text_key} of turn {number}"
    if layout.has_parts and isinstance(text, list):
        return speaker, _join_parts(text, name, images)
    images.skip(check_text(text, name).count(IMAGE_PLACEHOLDER))
    return speaker, text


def _check_loss(turn: dict, number: int) -> None:
    """Raises BadRecord if an answer is not to be trained on, or less than others."""
    for key in LOSS_KEYS:
        if turn.get(key) not in (None, 1):  # True is 1
            raise BadRecord(
                f"has {key!r} in turn {number}, {describe(turn[key])}: every answer is trained on "
                "alike, so leave out the record or the turns from there on"
            )


def _join_parts(parts: list, name: str, images: "_ImageList") -> str:
    """Returns the text of a list of parts; an image is a placeholder on a line of its own.

    `hub.text.dialogue.content_parts` splits the text into the same parts.
    """
    text = ""
    for number, part in enumerate(parts, 1):
        part_name = f"part {number} of {name}"
        kind = part.get("type") if isinstance(part, dict) else None
        # Other keys of a part are null in Parquet files.
        if kind == "text":
            value = check_text(part.get("text"), part_name)
            images.skip(value.count(IMAGE_PLACEHOLDER))
            text += value
        elif kind in ("image", "image_url"):
            images.take(read_part(part, part_name))
            text += IMAGE_PLACEHOLDER + ("\n" if number < len(parts) else "")
        else:
            shown = describe(part) if kind is None else f"the type {kind!r}"
            raise BadRecord(f"has {shown} as {part_name}: only text, image and image_url are read")
    return text


class _ImageList:
    """Images of a record in the order of their placeholders, some of them in parts of its turns."""

    def __init__(self, images: list[str | bytes]):
        self._remaining = images
        self._ordered: list[str | bytes] = []

    def skip(self, count: int) -> None:
        """Assigns the next images of the record to placeholders of a text."""
        self._ordered += self._remaining[:count]
        self._remaining = self._remaining[count:]

    def take(self, image: str | bytes | None) -> None:
        """Adds the image of a part; None: the next image of the record."""
        if image is None:
            self.skip(1)
        else:
            self._ordered.append(image)

    def all(self) -> tuple[str | bytes, ...]:
        return (*self._ordered, *self._remaining)


def _record_images(record: dict, keys: tuple[str, ...]) -> list[str | bytes]:
    present = [key for key in keys if record.get(key) not in (None, "", [])]
    if len(present) > 1:
        raise BadRecord(f"has both {present[0]!r} and {present[1]!r}: keep one of them")
    return read_images(record[present[0]], repr(present[0])) if present else []


def _parse_question(record: dict) -> dict:
    """One turn of each speaker. Images precede a question without placeholders, one a line."""
    question_key = _first_key(record, QUESTION_KEYS)
    answer_key = _first_key(record, ANSWER_KEYS)
    if answer_key is None:
        raise BadRecord(f"has the keys {list_keys(record)}, and no answer")
    for key in UNSUPPORTED_QUESTION_KEYS:
        if record.get(key):
            raise BadRecord(
                f"has {key!r}, which is not read: write the whole question into 'question', or "
                "all turns into 'messages'"
            )
    images = _record_images(record, IMAGE_KEYS + FILE_KEYS)
    if question_key is None and not images:
        raise BadRecord("has neither a question nor an image")
    question = "" if question_key is None else check_text(record[question_key], repr(question_key))
    if IMAGE_PLACEHOLDER not in question:
        lines = [IMAGE_PLACEHOLDER] * len(images)
        question = "\n".join([*lines, question] if question else lines)
    # The most frequent one, and of equally frequent ones the first.
    ((answer, _),) = Counter(_answers(record, answer_key)).most_common(1)
    references = _answers(record, _first_key(record, REFERENCE_KEYS) or answer_key)
    return {
        "turns": (question, answer),
        "images": tuple(images),
        "system": _system(record),
        "answers": () if references == (answer,) else (references,),
    }


def _answers(record: dict, key: str) -> tuple[str, ...]:
    """Returns the answers to a question: a text, or a list."""
    if not isinstance(record[key], list | dict):
        return (check_text(record[key], repr(key)),)
    (answers,) = _texts_per_question(record, key, 1)
    if not answers:
        raise BadRecord(f"has an empty list in {key!r}")
    return answers


def _texts_per_question(
    record: dict, key: str | None, questions: int
) -> tuple[tuple[str, ...], ...]:
    """Returns the texts of each question, which a record of one question may have as a flat list.

    A text may be in an object with the key 'answer', as in VQAv2. Empty if the record has none.
    """
    value = _rows_of_columns(record.get(key))
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadRecord(f"has {describe(value)} as {key!r}, not a list")
    is_nested = bool(value) and all(isinstance(texts, list) for texts in value)
    lists = value if is_nested else [value]
    if len(lists) != questions:
        raise BadRecord(
            f"has {len(lists)} list(s) of {key!r} for {questions} question(s), not one for each"
        )
    checked = []
    for items in lists:
        texts = [item.get("answer") if isinstance(item, dict) else item for item in items]
        checked.append(tuple(check_text(text, f"an element of {key!r}") for text in texts))
    return tuple(checked)
