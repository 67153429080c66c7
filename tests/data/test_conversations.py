"""Conversations in LLaVA's format: read as written; invalid entries are named in the error."""

import json
import os
import re
from dataclasses import replace

import pytest

from vlm_jax.config import Data, UserError
from vlm_jax.data import conversations
from vlm_jax.testing import write_conversations


def talk(*said, **fields):
    """A record whose speakers take turns, the human first."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": "talk 7", "conversations": turns, **fields}


@pytest.fixture
def written(tmp_path):
    """`written(records, name)`: the files field of a Data."""

    def write(records, name="talks.json"):
        lines = "\n".join(json.dumps(record) for record in records)
        (tmp_path / name).write_text(lines if name.endswith("l") else json.dumps(records))
        return (str(tmp_path / name),)

    return write


def test_conversations_come_back_in_order_with_their_images(tmp_path):
    source = conversations.load(write_conversations(tmp_path), "train")
    talks = json.loads((tmp_path / "talks.json").read_text())
    assert len(source) == len(talks) == 12
    for read, record in zip(source, talks, strict=True):
        assert read.id == record["id"]
        assert list(read.turns) == [turn["value"] for turn in record["conversations"]]
        named = record.get("image", [])
        named = [named] if isinstance(named, str) else named
        images = [
            (f"image {name} (record {read.id!r})", (tmp_path / name).read_bytes()) for name in named
        ]
        assert [source.image(i) for i in read.images] == images
    assert source.most_images == 2


def test_slices_and_what_is_no_split(tmp_path):
    data = replace(write_conversations(tmp_path), train_split="train[:75%]")
    assert len(conversations.load(data, data.train_split)) == 9
    assert conversations.load(data, "train[75%:]")[0].id == "talk 9"
    with pytest.raises(UserError, match="eval.split 'test' does not exist: choose train"):
        conversations.load(data, "test")


def test_an_image_of_many_conversations_is_kept_once(tmp_path):
    data = write_conversations(tmp_path, count=2)
    talks = json.loads((tmp_path / "talks.json").read_text())
    (tmp_path / "talks.json").write_text(json.dumps([*talks, *talks]))
    source = conversations.load(data, "train")
    assert [talk.images for talk in source] == [(), (0,)] * 2


def test_lines_of_jsonl_and_text_without_any_image(written, tmp_path):
    files = written([talk("a", "b"), talk("c", "d")], "talks.jsonl")
    source = conversations.load(
        Data(source="conversations", files=files, dir=str(tmp_path / "sets")), "train"
    )
    assert [talk.turns for talk in source] == [("a", "b"), ("c", "d")]
    assert source.most_images == 0


def test_changed_files_are_another_dataset(tmp_path):
    data = write_conversations(tmp_path, count=3)
    assert len(conversations.load(data, "train")) == 3
    write_conversations(tmp_path, count=4)
    assert len(conversations.load(data, "train")) == 4


def test_bad_files_and_missing_images_are_named_and_nothing_is_prepared(tmp_path):
    data = write_conversations(tmp_path, count=3)
    (tmp_path / "2_0.jpg").unlink()
    (tmp_path / "2_1.png").unlink()
    names = r"2_0.jpg \(record 'talk 2'\); 2_1.png \(record 'talk 2'\)"
    with pytest.raises(
        UserError, match=f"data.image_dir {tmp_path} lacks 2 of 3 images: {names}.$"
    ):
        conversations.load(data, "train")
    file = tmp_path / "talks.json"
    for text, message in (("[{", "is not valid JSON"), ("", "is empty"), (None, "No such file")):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(UserError, match=f"{file}.*{message}"):
            conversations.load(data, "train")


def cut(path, size_bytes=100):
    """Cuts a file short, and returns its whole content."""
    whole = path.read_bytes()
    path.write_bytes(whole[:size_bytes])
    return whole


def test_all_broken_images_are_named_at_once_and_after_the_repair_the_set_is_prepared(tmp_path):
    data = write_conversations(tmp_path)
    whole = {name: cut(tmp_path / name) for name in ("1_0.jpg", "4_0.jpg")}
    (tmp_path / "8_1.png").write_text("not an image")
    whole["8_1.png"] = (tmp_path / "5_1.png").read_bytes()
    with pytest.raises(UserError) as refused:
        conversations.load(data, "train")
    message = str(refused.value)
    assert message.startswith(f"3 of 12 images in data.image_dir {tmp_path} cannot be used: ")
    for name, talk in (("1_0.jpg", 1), ("4_0.jpg", 4), ("8_1.png", 8)):
        assert re.search(
            f"image {name} is not a readable image: [^;]* \\(record 'talk {talk}'\\)", message
        )
    assert not list((tmp_path / "datasets" / "conversation_images").rglob("*.array_record*"))
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    source = conversations.load(data, "train")
    assert source.image(0)[1] == whole["1_0.jpg"]


def test_of_many_broken_images_ten_are_named(tmp_path):
    data = write_conversations(tmp_path, count=36)
    for path in tmp_path.glob("*.jpg"):
        cut(path)
    with pytest.raises(
        UserError, match=r"^24 of 36 images .* cannot be used: .*, and 14 more; repair"
    ) as refused:
        conversations.load(data, "train")
    assert str(refused.value).count(".jpg is not a readable image") == 10


def test_an_image_that_was_replaced_under_its_name_is_seen(tmp_path):
    data = write_conversations(tmp_path)
    before = conversations.load(data, "train")
    path = tmp_path / "1_0.jpg"
    path.write_bytes((tmp_path / "2_0.jpg").read_bytes())
    os.utime(path, ns=(0, 10**18))
    after = conversations.load(data, "train")
    assert after.image(0)[1] == path.read_bytes() != before.image(0)[1]
    assert [after.image(i) for i in range(1, 12)] == [before.image(i) for i in range(1, 12)]
    assert list(after) == list(before)


def test_a_prepared_set_is_found_again_and_serves_without_the_image_files(tmp_path, capsys):
    data = write_conversations(tmp_path)
    prepared = [conversations.load(data, "train").image(i) for i in range(12)]
    assert "preparing the dataset conversation_images" in capsys.readouterr().out
    conversations.load(data, "train")
    assert capsys.readouterr().out == ""
    (tmp_path / "2_0.jpg").unlink()
    assert [conversations.load(data, "train").image(i) for i in range(12)] == prepared
    conversations.load(data, "train")
    lacks = f"data.image_dir {tmp_path} lacks 1 of 12 images: 2_0.jpg (record 'talk 2')"
    expected = f"{lacks}; using the dataset that was prepared last\n"
    assert capsys.readouterr().out == expected


def test_a_conversation_has_its_type_and_its_place(tmp_path):
    data = write_conversations(tmp_path, count=3)
    talks = json.loads((tmp_path / "talks.json").read_text())
    talks[1]["type"] = "colors"
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    (tmp_path / "more.jsonl").write_text("\n" + json.dumps(talks[0]))
    data = replace(data, files=(*data.files, str(tmp_path / "more.jsonl")))
    source = conversations.load(data, "train")
    assert [talk.type for talk in source] == [
        "conversation",
        "colors",
        "conversation",
        "conversation",
    ]
    assert source.location(1) == f"{tmp_path}/talks.json: record 1 (id 'talk 1')"
    assert (
        conversations.Selection(source, [3]).location(0)
        == f"{tmp_path}/more.jsonl: line 2 (id 'talk 0')"
    )
