"""Conversations in every form: the same content is the same rows, and faults are named."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import jax
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from tests.data import conversation_forms as forms
from vlm_jax.config import ConfigError, Data, Train, UserError
from vlm_jax.config.datasets import CONVERSATION_FORMATS
from vlm_jax.config.validate import validate
from vlm_jax.data import conversations, pipeline, questions, templates
from vlm_jax.data.forms.files import read_files
from vlm_jax.testing import tiny

COUNT = 50


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """Folder of the images, the conversations, and the file of each form."""
    folder = tmp_path_factory.mktemp("rich")
    talks = forms.talks(folder, COUNT)
    return folder, talks, forms.write_forms(folder, talks)


@pytest.fixture(scope="module")
def simple(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simple")
    talks = forms.talks(folder, COUNT, is_simple=True)
    return folder, talks, forms.write_simple_forms(folder, talks)


def as_read(folder: Path, file: Path, format_name: str = "auto") -> list[dict]:
    """The records of a file in the form of `forms.talks`, with the contents of their images."""
    records = []
    for record in read_files((str(file),), format_name):
        images = [
            forms.content(folder, image) if isinstance(image, str) else image
            for image in record.images
        ]
        records.append(
            {
                "id": record.id,
                "images": images,
                "turns": list(record.turns),
                "system": record.system,
                "type": record.type,
            }
        )
    return records


@pytest.mark.parametrize("content", ["rich", "simple"])
def test_every_form_of_the_same_content_has_the_same_records(content, request):
    folder, talks, files = request.getfixturevalue(content)
    expected = [
        {**talk, "images": [forms.content(folder, name) for name in talk["images"]]}
        for talk in talks
    ]
    for name, file in files.items():
        assert as_read(folder, file) == expected, name


def load(folder: Path, *files: Path, **fields) -> conversations.Conversations:
    return conversations.load(section(folder, *files, **fields), "train")


def section(folder: Path, *files: Path, **fields) -> Data:
    return Data(
        source="conversations",
        files=tuple(map(str, files)),
        image_dir=str(folder),
        dir=str(folder / "sets"),
        augment=(),
        **fields,
    )


def contents(source) -> list[tuple]:
    """Every conversation with the contents of its images instead of their indices."""
    return [
        (replace(talk, images=()), [source.image(index)[1] for index in talk.images])
        for talk in source
    ]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("rich", ["openai data URLs", "parquet", "arrow", "webdataset"]),
        ("simple", ["csv"]),
    ],
)
def test_every_form_of_the_same_content_trains_on_the_same_rows(content, names, request):
    folder, talks, files = request.getfixturevalue(content)

    def batches(name: str) -> tuple[list[bytes], list[tuple]]:
        data = section(folder, files[name], images_per_row=3, text_length=250, template="vicuna")
        cfg = tiny(data=data, train=Train(batch_size=2))
        cfg = replace(cfg, decoder=replace(cfg.decoder, max_positions=512))
        tokenizer = pipeline.train_tokenizer(cfg)
        iterator = pipeline.training_iterator(cfg, tokenizer)
        arrays = jax.tree.leaves([next(iterator) for _ in range(4)])
        return [array.tobytes() for array in arrays], contents(load(folder, files[name]))

    expected = batches("llava")
    assert [talk.system for talk, _ in expected[1]] == [talk["system"] for talk in talks]
    for name in names:
        assert batches(name) == expected, name


def test_a_question_is_asked_after_the_system_turn_that_it_is_trained_with(rich):
    folder, talks, files = rich
    data = section(folder, files["parquet"], images_per_row=3, text_length=250, template="vicuna")
    cfg = tiny(data=data)
    cfg = replace(cfg, decoder=replace(cfg.decoder, max_positions=512))
    tokenizer = pipeline.train_tokenizer(cfg)
    question = questions.load(cfg, "train")[5]
    assert question.system == talks[5]["system"] == forms.SYSTEM
    tokens = questions.question_batch(cfg, tokenizer, [question], [question]).tokens[0]
    assert len(tokens) == questions.row_length(cfg, tokenizer, [question])
    trained = templates.encode(cfg, tokenizer, talks[5]["turns"], [1], forms.SYSTEM)["tokens"]
    assert tokens.tolist() == trained[: len(tokens)].tolist()
    plain = replace(cfg, data=replace(data, template="plain"))
    with pytest.raises(ConfigError, match=f"no system turn, but {files['parquet']}: row 0"):
        questions.load(plain, "train")


def test_files_of_several_forms_are_read_together(simple):
    folder, talks, files = simple
    source = load(folder, files["csv"], files["parquet"], files["json"])
    assert [talk.id for talk in source] == [talk["id"] for talk in talks] * 3
    assert [source.location(index) for index in (1, COUNT + 1, 2 * COUNT + 1)] == [
        f"{folder}/a.csv: line 4 (id 'talk 1')",
        f"{folder}/qa.parquet: row 1 (id 'talk 1')",
        f"{folder}/qa.jsonl: line 3 (id 'talk 1')",
    ]


def tar_of(**members: bytes) -> bytes:
    """A tar file whose members are named a.EXTENSION, each keyword being an extension."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as shard:
        for extension, data in members.items():
            member = tarfile.TarInfo(f"a.{extension}")
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return file.getvalue()


def parquet_of(**columns) -> bytes:
    file = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def messages_of(*turns, **fields) -> bytes:
    return json.dumps([{"id": "a7", "messages": list(turns), **fields}]).encode()


def user(content, **fields):
    return {"role": "user", "content": content, **fields}


BOT = {"role": "assistant", "content": "b"}
CAPTION = json.dumps({"caption": "b"}).encode()
FAULTS = {
    "a tool": (
        "a.json",
        messages_of(user("a"), BOT, {"role": "tool", "content": "c"}),
        "record 0 .id 'a7'. has a turn from 'tool' .turn 3.: only user, assistant, system are",
    ),
    "a call of a tool": (
        "a.json",
        messages_of(user("a"), {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}),
        "has 'tool_calls' in turn 2, which is not supported",
    ),
    "a URL": (
        "a.json",
        messages_of(user([{"type": "image_url", "image_url": {"url": "http://x/a.png"}}]), BOT),
        "has the URL 'http://x/a.png' as 'image_url' of part 1 of the content of turn 1",
    ),
    "a video": (
        "a.json",
        messages_of(user([{"type": "video", "video": "a.mp4"}]), BOT),
        "has the type 'video' as part 1 of the content of turn 1: only text, image and image_url",
    ),
    "a data URL that is not base64": (
        "a.json",
        messages_of(user([{"type": "image", "image": "data:image/png;base64,%%%"}]), BOT),
        "has a data URL as 'image' of part 1 .* that is not base64",
    ),
    "a data URL of a video": (
        "a.json",
        messages_of(user([{"type": "image", "image": "data:video/mp4;base64,AA=="}]), BOT),
        "does not begin with data:image/TYPE;base64",
    ),
    "an image part without an image": (
        "a.json",
        messages_of(user([{"type": "image"}]), BOT),
        "has 0 images but 1 <image> placeholders",
    ),
    "an image without a part": (
        "a.json",
        messages_of(user("a"), BOT, images=["a.png"]),
        "has 1 images but 0 <image> placeholders",
    ),
    "an answer that is not to be trained on": (
        "a.json",
        messages_of(user("a"), BOT | {"weight": 0}),
        "has 'weight' in turn 2, the number 0: every answer is trained on alike",
    ),
    "an answer without a loss": (
        "a.json",
        messages_of(user("a"), BOT | {"loss": False}),
        "has 'loss' in turn 2, the truth value false: every answer is trained on alike",
    ),
    "thoughts before an answer": (
        "a.json",
        messages_of(user("a"), BOT | {"reasoning_content": "hm"}),
        "has 'reasoning_content' in turn 2, which is not supported",
    ),
    "an object that is not an image": (
        "a.json",
        messages_of(user("<image>"), BOT, image={"url": "a.png"}),
        "has an object without 'bytes' and 'path' as 'image'",
    ),
    "a part that is a text": ("a.json", messages_of(user(["a"]), BOT), "has a text as part 1 of"),
    "image and images": (
        "a.json",
        messages_of(user("<image>"), BOT, image="a.png", images=["b.png"]),
        "has both 'image' and 'images': keep one of them",
    ),
    "an answer without a question": (
        "a.jsonl",
        b'{"answer": "b"}',
        "line 1 has neither a question nor an image",
    ),
    "earlier turns beside a question": (
        "a.jsonl",
        b'{"query": "a", "response": "b", "history": [["c", "d"]]}',
        "line 1 has 'history', which is not read: write .* all turns into 'messages'",
    ),
    "an instruction beside an image": (
        "a.jsonl",
        b'{"instruction": "a", "response": "b", "image": "a.png"}',
        "line 1 has 'instruction', which is not read: write the whole question into 'question'",
    ),
    "an empty list of answers": (
        "a.jsonl",
        b'{"question": "a", "answers": [[]]}',
        "line 1 has an empty list in 'answers'",
    ),
    "no answer": (
        "a.csv",
        b"image,question,answer\na.png,what?,b\na.png,what?,\n",
        "line 3 has the keys 'image', 'question', 'answer', and no answer",
    ),
    "another number of cells": (
        "a.tsv",
        b"question\tanswer\n\na\tb\tc\n",
        "line 3 has 3 cells for 2 columns",
    ),
    "no column of answers": (
        "a.csv",
        b"image;question;answer\n",
        " has the columns 'image;question;answer', separated by commas: it needs an answer, in a",
    ),
    "two columns": ("a.csv", b"answer,answer\na,b\n", "has two columns 'answer': rename"),
    "a quote without an end": ("a.csv", b'question,answer\n"a,b\n', "line 2 is not valid CSV"),
    "no rows": ("a.csv", b"question,answer\n", "has column names but no rows"),
    "Latin-1": ("a.csv", "question,answer\ng\xfcn,b\n".encode("latin-1"), "UTF-8: line 2 .*0xfc"),
    "a damaged parquet file": ("a.parquet", b"PAR1 and no more", "not a readable Parquet file"),
    "an empty parquet file": ("a.parquet", parquet_of(answer=pa.array([], "string")), "no rows"),
    "other columns": (
        "a.parquet",
        parquet_of(prompt=["a"], completion=["b"]),
        "row 0 has the keys 'prompt', not a list 'conversations'",
    ),
    "a class": (
        "a.parquet",
        parquet_of(question=["a"], label=[3]),
        "row 0 has the number 3 as 'label', not text",
    ),
    "a damaged shard": ("a.tar", b"not a tar file" * 100, "is not a readable tar file"),
    "a shard that is cut": (
        "a.tar",
        tar_of(png=bytes(9000), json=CAPTION)[:5000],
        "is not a readable tar file: unexpected end of data",
    ),
    "a sample without a text": (
        "a.tar",
        tar_of(png=b"1"),
        "sample 'a' has the keys 'id', 'images'",
    ),
    "a sample with a video": (
        "a.tar",
        tar_of(mp4=b"1", json=CAPTION),
        "sample 'a' has a file .mp4: only jpg, jpeg, png, webp, json and txt are read",
    ),
    "a sample that is a list": ("a.tar", tar_of(json=b"[]"), "has a list in its .json"),
}


@pytest.mark.parametrize(("name", "content", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_its_file_and_record(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path / name}.*{message}") as raised:
        list(read_files((str(tmp_path / name),)))
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_a_saved_split_is_named(tmp_path):
    for files, message in (
        ({}, "is a folder without state.json"),
        (
            {"dataset_dict.json": '{"splits": ["train", "test"]}'},
            "the splits train, test: name",
        ),
        ({"state.json": '{"_data_files": [{"filename": "a.arrow"}]}'}, "No such file"),
        ({"state.json": "{}"}, "state.json names no Arrow files"),
        ({"state.json": "{"}, "state.json is not valid JSON"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        with pytest.raises(UserError, match=f"{folder}.*{message}"):
            list(read_files((str(folder),)))


def test_weights_of_one_and_of_questions_change_nothing(tmp_path):
    asked = user("a") | {"weight": 0, "train": False}
    (tmp_path / "a.json").write_bytes(messages_of(asked, BOT | {"weight": 1, "train": True}))
    (record,) = read_files((str(tmp_path / "a.json"),))
    assert record.turns == ("a", BOT["content"])


def test_an_empty_image_is_an_image_and_a_struct_of_nulls_is_none(tmp_path):
    """An empty image is named as unreadable later; its record was trained on as text."""
    nulls = {"bytes": None, "path": None}
    columns = {"question": ["a", "b"], "answer": ["c", "d"]}
    (tmp_path / "a.parquet").write_bytes(parquet_of(image=[b"1", b""], **columns))
    assert [record.images for record in as_records(tmp_path / "a.parquet")] == [(b"1",), (b"",)]
    structs = [nulls | {"bytes": b"1"}, nulls]
    (tmp_path / "b.parquet").write_bytes(parquet_of(image=structs, **columns))
    assert [record.images for record in as_records(tmp_path / "b.parquet")] == [(b"1",), ()]


def as_records(file: Path) -> list:
    return list(read_files((str(file),)))


@pytest.mark.parametrize("key", ["image", "images", "image_path", "file_name"])
def test_the_images_of_a_shard_replace_the_paths_of_its_records(key, tmp_path):
    record = json.dumps({"question": "a", "answer": "b", key: "elsewhere/a.jpg"})
    (tmp_path / "a.tar").write_bytes(tar_of(jpg=b"1", json=record.encode()))
    (read,) = as_records(tmp_path / "a.tar")
    assert (read.images, read.turns) == ((b"1",), ("<image>\na", "b"))


def test_a_text_file_of_a_shard_is_a_caption_of_its_image(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of(jpg=b"1", txt="größe\n".encode()))
    (record,) = read_files((str(tmp_path / "a.tar"),))
    assert (record.id, record.turns, record.images) == ("a", ("<image>", "größe"), (b"1",))


def test_images_of_a_record_and_of_its_parts_keep_the_order_of_their_placeholders(tmp_path):
    parts = [
        {"type": "image"},
        {"type": "image", "path": "part.png"},
        {"type": "text", "text": "and <image>?"},
    ]
    content = messages_of(
        user("<image>a"), BOT, user(parts), BOT, images=["a.png", "b.png", "c.png"]
    )
    (tmp_path / "a.json").write_bytes(content)
    (record,) = read_files((str(tmp_path / "a.json"),))
    assert record.images == ("a.png", "b.png", "part.png", "c.png")
    assert record.turns[2] == "<image>\n<image>\nand <image>?"


def test_answers_of_a_question_are_references_and_the_most_frequent_is_trained_on(tmp_path):
    for fields, answer, references in (
        ({"answer": "a"}, "a", ()),
        ({"answers": "a"}, "a", ()),
        ({"answers": ["a", "b"]}, "a", (("a", "b"),)),
        ({"answers": ["b", "a", "a"]}, "a", (("b", "a", "a"),)),
        ({"answer": "c", "answers": [{"answer": "a"}, {"answer": "b"}]}, "c", (("a", "b"),)),
        ({"answers": {"answer": ["a", "b"], "answer_id": [1, 2]}}, "a", (("a", "b"),)),
        ({"answer": "c", "references": ["a"]}, "c", (("a",),)),
        ({"caption": ["a", "b"]}, "a", (("a", "b"),)),
    ):
        forms.write_json(tmp_path / "a.json", [{"question": "what?", **fields}])
        (record,) = read_files((str(tmp_path / "a.json"),))
        assert (record.turns, record.answers) == (("what?", answer), references)


def test_a_form_is_forced_and_another_is_refused(rich):
    folder, _, files = rich
    for name, format_name in (("openai", "openai"), ("llava", "llava"), ("sharegpt", "sharegpt")):
        assert as_read(folder, files[name], format_name) == as_read(folder, files[name])
    with pytest.raises(UserError, match="50 of 50 .*record 0 .*, not a list 'messages'"):
        as_read(folder, files["llava"], "openai")
    with pytest.raises(UserError, match="llava.json is not a readable Parquet file"):
        as_read(folder, files["llava"], "parquet")


def test_an_unknown_form_is_refused_with_the_choices():
    data = Data(source="conversations", files=("a.json",), augment=(), format="parket")
    choices = ", ".join(["auto", *CONVERSATION_FORMATS])
    with pytest.raises(ConfigError, match=f"'parket' is unknown .*: choose one of {choices}"):
        validate(tiny(data=data))
    with pytest.raises(ConfigError, match="data.format applies only to data.source conversations"):
        validate(tiny(data=Data(format="csv")))


def test_records_with_an_unreadable_image_are_left_out_and_counted(tmp_path, capsys):
    talks = forms.talks(tmp_path, COUNT)
    names = forms.write_images(tmp_path)
    (tmp_path / names[0]).write_bytes(b"not an image")
    (tmp_path / names[1]).unlink()
    bad = {names[0], names[1]}
    left = [talk["id"] for talk in talks if not bad & {*talk["images"]}]
    file = forms.write_json(tmp_path / "a.json", list(map(forms.llava, talks)))
    with pytest.raises(UserError, match=f"lacks 1 of 5 images: {names[1]}"):
        load(tmp_path, file)
    source = load(tmp_path, file, unreadable_images="skip")
    assert [talk.id for talk in source] == left
    printed = capsys.readouterr().out
    assert (
        f"{COUNT - len(left)} of {COUNT} conversations have images that cannot be used" in printed
    )
    assert "image a.png is not a readable image" in printed
    assert f"cannot read the image {tmp_path / names[1]}: No such file" in printed
    assert "are left out (data.unreadable_images skip)" in printed
    # The set with gaps is not found without skip.
    with pytest.raises(UserError, match=f"lacks 1 of 5 images: {names[1]}"):
        load(tmp_path, file)
    forms.write_images(tmp_path)
    assert len(load(tmp_path, file)) == COUNT


def test_unreadable_images_of_a_parquet_file_are_named_by_row(tmp_path):
    good = io.BytesIO()
    Image.new("RGB", (4, 4)).save(good, "png")
    rows = [
        {"id": f"r{i}", "image": {"bytes": content}, "question": "what?", "answer": "b"}
        for i, content in enumerate([good.getvalue(), b"bad"])
    ]
    file = forms.write_parquet(tmp_path / "a.parquet", rows)
    name = r"image 1 of row 1 \(id 'r1'\) is not a readable image"
    with pytest.raises(UserError, match=f"1 of 2 images in {file} cannot be used: {name}"):
        load(tmp_path, file)
    source = load(tmp_path, file, unreadable_images="skip")
    assert [talk.id for talk in source] == ["r0"]
    forms.write_parquet(file, rows[1:])
    with pytest.raises(UserError, match="1 of 1 conversations have images .*: none is left"):
        load(tmp_path, file, unreadable_images="skip")


def test_offsets_outside_a_damaged_file_are_an_error(tmp_path):
    """pyarrow would read outside its buffers."""
    folder = forms.write_arrow(tmp_path / "saved", [{"question": "a", "answer": "b" * 9}], 1)
    (file,) = folder.glob("*.arrow")
    content = file.read_bytes()
    answer = b"\x09\0\0\0" + b"b" * 9  # its last offset, and its text
    assert content.count(answer) == 1
    file.write_bytes(content.replace(answer, b"\x09\0\0\x70" + b"b" * 9))
    with pytest.raises(UserError, match=f"{folder} is not a readable Arrow dataset: "):
        list(read_files((str(folder),)))
