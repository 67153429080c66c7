"""Files of conversations are read by content, whatever editor wrote them; errors name the entry."""

import gzip
import json
import re

import pytest

from vlm_jax.config import UserError
from vlm_jax.data.forms.files import read_files
from vlm_jax.data.forms.record import DEFAULT_TYPE

MARK_BYTES = b"\xef\xbb\xbf"


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def record(*turns, **fields):
    return {"id": "a7", "conversations": list(turns) or [human("a"), gpt("b")], **fields}


LINES = [
    json.dumps(record(human(f"question {i}"), gpt(f"answer {i}"), id=f"a{i}")) for i in range(4)
]
LIST = f"[{','.join(LINES)}]"
SOUND = {
    "a list": LIST,
    "a list over many lines": json.dumps(json.loads(LIST), indent=1),
    "lines": "\n".join(LINES),
    "Windows line ends": "\r\n".join([*LINES, ""]),
    "line ends of an old Mac": "\r".join(LINES),
    "empty lines": "\n\n" + "\n\n \t\n".join(LINES) + "\n \n",
    "empty lines from Windows": "\r\n\r\n".join(["", *LINES, ""]),
    "a byte order mark": MARK_BYTES.decode() + LIST,
    "a byte order mark before lines": MARK_BYTES.decode() + "\n".join(LINES),
    "joined files with a byte order mark each": "\n".join(
        MARK_BYTES.decode() + line for line in LINES
    ),
}


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_files((str(path),)))


@pytest.mark.parametrize("name", ["talks.json", "talks.jsonl", "talks.JSONL", "talks"])
@pytest.mark.parametrize("content", SOUND.values(), ids=SOUND)
def test_the_content_decides_how_a_file_is_read(content, name, tmp_path):
    records = read(tmp_path / name, content)
    assert [one.id for one in records] == ["a0", "a1", "a2", "a3"]
    assert records[3].turns == ("question 3", "answer 3")


DAMAGED = LINES[2][:-4]
UNREADABLE = {
    "no bytes": (b"", "is empty"),
    "blank lines": (b" \r\n\n\t", "is empty"),
    "a byte order mark alone": (MARK_BYTES, "is empty"),
    "an empty list": (b"[]", "is an empty list"),
    "Latin-1": (
        "\n".join([LINES[0], LINES[1].replace("question", "qu\xe9")]).encode("latin-1"),
        "UTF-8: line 2 .*0xe9",
    ),
    "UTF-16": (LIST.encode("utf-16"), "not text in UTF-8"),
    "gzip": (gzip.compress(LIST.encode(), mtime=0), "not a text file: it may be compressed"),
    "zeros at the end": (("\n".join(LINES) + "\n\0\0").encode(), "line 5 has a NUL byte"),
    "an object": (
        json.dumps({"data": json.loads(LIST)}).encode(),
        "single JSON object with the keys 'data'",
    ),
    "an object over many lines": (
        json.dumps({"data": []}, indent=1).encode(),
        "single JSON object",
    ),
    "a list cut short": (LIST[:-5].encode(), "is not valid JSON: .*line 1 column"),
    "a damaged line": (
        "\n".join([*LINES[:2], DAMAGED, LINES[3]]).encode(),
        ": line 3 is not valid JSON",
    ),
    "a damaged first line": ("\n".join([DAMAGED, *LINES]).encode(), ": line 1 is not valid JSON"),
    "a damaged line after empty ones": (
        ("\n\n" + DAMAGED + "\n").encode(),
        ": line 3 is not valid JSON",
    ),
    "a line without its end": (
        f"{LINES[0]}\n{LINES[1][:-3]}\n{LINES[2]}".encode(),
        ": line 2 is not valid JSON",
    ),
    "a table": (b"id,text\n7,a\n", ": line 1 is not valid JSON"),
    "too deep a list": (b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", ["talks.json", "talks.jsonl"])
@pytest.mark.parametrize("content, message", UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_cannot_be_read_is_named_with_the_line(content, message, name, tmp_path):
    with pytest.raises(UserError, match=f"(?s){tmp_path / name}.*{message}"):
        read(tmp_path / name, content)


MALFORMED = {
    "a system turn at the end": (
        record(human("a"), gpt("b"), {"from": "system", "value": ""}),
        "turn from system where human must follow .turn 3.",
    ),
    "two system turns": (
        record({"from": "system", "value": "be short"}, human("a"), gpt("b"), system="be long"),
        "has a system turn and 'system': keep one of them",
    ),
    "an image in a system turn": (
        record(human("<image>"), gpt("b"), image="x.jpg", system="<image>"),
        "has <image> in its system turn",
    ),
    "a tool": (
        record(human("a"), {"from": "observation", "value": "b"}),
        "from 'observation' .turn 2.: only user, assistant, system, human, gpt are supported",
    ),
    "a video": (record(video="x.mp4"), "has 'video', which is not supported"),
    "a URL": (
        record(human("<image>a"), gpt("b"), image="https://x.org/a.jpg"),
        "has the URL 'https://x.org/a.jpg' as 'image': only paths, file",
    ),
    "two questions in a row": (
        record(human("a"), human("b"), gpt("c")),
        "turn from human where gpt must follow .turn 2.",
    ),
    "two answers in a row": (
        record(human("a"), gpt("b"), gpt("c")),
        "turn from gpt where human must follow .turn 3.",
    ),
    "a number": (record(human("a"), gpt(3)), "has the number 3 as the value of turn 2, not text"),
    "no number": (
        record(human("a"), gpt(float("nan"))),
        "has the number NaN as the value of turn 2",
    ),
    "null": (record(human("a"), gpt(None)), "has null as the value of turn 2"),
    "yes": (record(human("a"), gpt(True)), "has the truth value true as the value of turn 2"),
    "parts": (record(human([{"type": "text"}]), gpt("a")), "has a list as the value of turn 1"),
    "half a surrogate pair": (
        record(human("a\ud800"), gpt("b")),
        "half a surrogate pair, .* in the value of turn 1",
    ),
    "no messages": ({"id": "a7", "messages": []}, "no turn from user that assistant answers"),
    "messages and conversations": (
        record(messages=[]),
        "has both 'conversations' and 'messages': keep one of them",
    ),
    "other keys": (
        {"id": "a7", "chat": []},
        "has the keys 'id', 'chat', not a list 'conversations' or 'messages', or 'question'",
    ),
    "roles": (
        record({"role": "user", "content": "a"}),
        "the keys 'role', 'content' .turn 1., not 'from' and 'value'",
    ),
    "a text for a turn": (record("a"), "has a text as turn 1"),
    "an object for the turns": (
        {"id": "a7", "conversations": {}},
        "has an object as 'conversations'",
    ),
    "lists of different lengths": (
        {"id": "a7", "conversations": {"from": ["human", "gpt"], "value": ["a"]}},
        "has an object as 'conversations'",
    ),
    "no answer": (record(human("a")), "no turn from human that gpt answers"),
    "no turns": ({"id": "a7", "conversations": []}, "no turn from human that gpt answers"),
    "a placeholder too many": (
        record(human("<image>a"), gpt("b")),
        "has 0 images but 1 <image> placeholders",
    ),
    "a placeholder too few": (record(image="x.jpg"), "has 1 images but 0 <image> placeholders"),
    "an image too many": (
        record(human("<image>a"), gpt("b"), image=["x.jpg", "y.jpg"]),
        "has 2 images but 1 <image> placeholders",
    ),
    "a number for an image": (
        record(human("<image>a"), gpt("b"), image=3),
        "has the number 3 as 'image', not text",
    ),
    "no number for an image": (record(image=float("nan")), "has the number NaN as 'image'"),
    "a path that is none": (
        record(human("<image>a"), gpt("b"), image="x\0.jpg"),
        "NUL character in 'image'",
    ),
    "a number for the type": (record(type=3), "has the number 3 as 'type', not text"),
}


@pytest.mark.parametrize("bad, message", MALFORMED.values(), ids=MALFORMED)
def test_a_record_that_is_not_a_conversation_is_named_with_its_fault(bad, message, tmp_path):
    for name, content, place in (
        ("a.json", [record(), bad], "record 1"),
        ("a.jsonl", [record(), bad], "line 2"),
    ):
        text = "\n".join(map(json.dumps, content)) if name == "a.jsonl" else json.dumps(content)
        with pytest.raises(
            UserError, match=f"1 of 2 records are not .*{name}: {place} .id 'a7'. .*{message}"
        ):
            read(tmp_path / name, text)


def test_the_first_bad_records_of_all_files_are_named_and_all_are_counted(tmp_path):
    bad = [json.dumps(record(human("a"), gpt(i), id=f"b{i}")) for i in range(4)]
    for name, lines in (("a.jsonl", [*bad, LINES[0]]), ("b.jsonl", [LINES[0], *bad])):
        (tmp_path / name).write_text("\n".join(lines))
    with pytest.raises(UserError) as raised:
        list(read_files((str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))))
    message = str(raised.value)
    assert message.startswith("8 of 10 records are not conversations: ")
    assert re.findall(r"\w\.jsonl: line \d", message) == [
        f"a.jsonl: line {i}" for i in range(1, 5)
    ] + ["b.jsonl: line 2"]
    assert "and 3 more" in message
    assert "\n" not in message


def test_a_record_without_an_object_is_named_by_its_number(tmp_path):
    for content, message in (
        ("[3]", "record 0 is the number 3, not"),
        ('[["a"]]', "record 0 is a list, not an object"),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "a.json", content)


def test_turns_that_make_no_pair_are_left_out(tmp_path):
    (one,) = read(
        tmp_path / "a.json", json.dumps([record(gpt("hello"), human("a"), gpt("b"), human("c"))])
    )
    assert one.turns == ("a", "b")


def test_one_record_is_a_list_of_one(tmp_path):
    for content, place in (
        (LINES[0], "line 1"),
        (json.dumps(json.loads(LINES[0]), indent=1), "record 0"),
    ):
        (one,) = read(tmp_path / "a.json", content)
        assert (one.turns, one.location) == (("question 0", "answer 0"), f"{place} (id 'a0')")


def test_turns_may_be_lists_of_speakers_and_of_texts(tmp_path):
    columns = {"from": ["system", "human", "gpt"], "value": ["be short", "a", "b"]}
    (one,) = read(tmp_path / "a.json", json.dumps([{"conversations": columns}]))
    assert (one.system, one.turns) == ("be short", ("a", "b"))


def test_fields_that_are_not_read_may_hold_anything(tmp_path):
    (one,) = read(
        tmp_path / "a.json", json.dumps([record(score=float("nan"), image=None, model=["x"])])
    )
    assert (one.images, one.type) == ((), DEFAULT_TYPE)


def test_a_record_has_its_type_place_and_number_as_id(tmp_path):
    first, second = read(
        tmp_path / "a.jsonl",
        f"\n{json.dumps(record(type='ocr'))}\n" + LINES[0].replace('"id"', '"key"'),
    )
    assert (first.type, first.location, second.id, second.location) == (
        "ocr",
        "line 2 (id 'a7')",
        "1",
        "line 3",
    )


TWO_QUESTIONS = (human("a"), gpt("b"), human("c"), gpt("d"))


def test_a_record_may_have_several_right_answers_and_choices_for_each_question(tmp_path):
    lines = [
        record(answers=["b", "B"], choices=["x", "b"]),
        record(*TWO_QUESTIONS, answers=[["b", "B"], []]),
        record(*TWO_QUESTIONS),
    ]
    flat, nested, none = read(tmp_path / "talks.json", json.dumps(lines))
    assert (flat.answers, flat.choices) == ((("b", "B"),), (("x", "b"),))
    assert nested.answers == (("b", "B"), ())
    assert (none.answers, none.choices) == ((), ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answers": "b"}, "record 0 .id 'a7'. has a text as 'answers', not a list"),
        ({"answers": [["b"], ["d"], ["e"]]}, "has 3 list.s. of 'answers' for 2 question.s."),
        ({"choices": ["b", "d"]}, "has 1 list.s. of 'choices' for 2 question.s."),
        ({"answers": [["b"], [3]]}, "has the number 3 as an element of 'answers', not text"),
        ({"answers": [["b"], "d"]}, "has 1 list.s. of 'answers' for 2"),
    ],
)
def test_right_answers_that_do_not_fit_the_questions_are_refused(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path / "talks.json", json.dumps([record(*TWO_QUESTIONS, **fields)]))
