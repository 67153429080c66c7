"""The same conversations written in every form, for tests."""

import base64
import csv
import io
import json
import tarfile
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

SYSTEM = "Answer in one word."
NAMES = ("a.png", "nested/deeper/b.png", "größe 图.png", "with space.png")


def write_images(folder: Path) -> list[str]:
    """Writes small images and returns their paths below the folder; the last path is absolute."""
    rng = np.random.default_rng(0)
    for name in (*NAMES, "absolute.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8)).save(path)
    return [*NAMES, str(folder / "absolute.png")]


def talks(folder: Path, count: int, is_simple: bool = False) -> list[dict]:
    """Returns conversations with 0 to 3 images, 1 to 3 questions and a system turn in some.

    Simple ones have one question, one image or none, and no system turn: a line of a table.
    """
    names, records = write_images(folder), []
    for number in range(count):
        image_count = number % (2 if is_simple else 4)
        images = [names[(number + k) % len(names)] for k in range(image_count)]
        question = "".join(["<image>\n" * image_count, f'what, "exactly", is {number}?\nété'])
        turns = [question, f"answer {number}; 是"]
        if not is_simple:
            turns += ["and?", "more"] * (number % 3)
        records.append(
            {
                "id": f"talk {number % (count - 1)}",  # one id twice
                "images": images,
                "turns": turns,
                "system": None if is_simple or number % 5 else SYSTEM,
                "type": "even" if number % 2 == 0 else "odd",
            }
        )
    return records


def messages(talk: dict, names: tuple[str, str, str], keys: tuple[str, str]) -> list[dict]:
    """Returns the turns of a talk; `names` are of system, user and assistant."""
    system, *speakers = names
    listed = [] if talk["system"] is None else [{keys[0]: system, keys[1]: talk["system"]}]
    for number, text in enumerate(talk["turns"]):
        listed.append({keys[0]: speakers[number % 2], keys[1]: text})
    return listed


def with_images(talk: dict, **fields) -> dict:
    """Returns a LLaVA record: 'image' is a path, a list, or absent."""
    images = talk["images"]
    record = {"id": talk["id"], "type": talk["type"], **fields}
    if images:
        record["image"] = images[0] if len(images) == 1 else images
    return record


def llava(talk: dict) -> dict:
    return with_images(
        talk, conversations=messages(talk, ("system", "human", "gpt"), ("from", "value"))
    )


def sharegpt(talk: dict) -> dict:
    """ShareGPT with other speakers, and the system turn as a key."""
    turns = messages({**talk, "system": None}, ("", "user", "assistant"), ("from", "value"))
    return with_images(talk, conversations=turns, system=talk["system"])


def openai(talk: dict, as_source=lambda path: {"type": "image", "path": path}) -> dict:
    """OpenAI messages whose images are parts, written by `as_source`."""
    paths = iter(talk["images"])
    turns = messages(talk, ("system", "user", "assistant"), ("role", "content"))
    for turn in turns:
        *placeholders, text = turn["content"].split("<image>\n")
        if placeholders:
            parts = [as_source(next(paths)) for _ in placeholders]
            turn["content"] = [*parts, {"type": "text", "text": text}]
    return {"id": talk["id"], "type": talk["type"], "messages": turns}


def question_answer(talk: dict) -> dict:
    question, answer = talk["turns"]
    return with_images(talk, question=question.removeprefix("<image>\n"), answer=answer)


def content(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


def data_url(folder: Path):
    def as_source(path):
        encoded = base64.b64encode(content(folder, path)).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}

    return as_source


def file_url(folder: Path):
    def as_source(path):
        return {"type": "image_url", "image_url": {"url": f"file://{quote(str(folder / path))}"}}

    return as_source


def column_records(folder: Path, talks: list[dict], turns_key: str) -> list[dict]:
    """Rows of Hugging Face's layout: images are structs of bytes and path, also in parts."""
    rows = []
    for talk in talks:
        record = llava(talk) if turns_key == "conversations" else openai(talk, lambda path: {})
        if turns_key == "messages":
            for turn in record["messages"]:
                if isinstance(turn["content"], str):
                    turn["content"] = [{"text": turn["content"]}]
                turn["content"] = [
                    {"type": "text" if part else "image", "text": part.get("text")}
                    for part in turn["content"]
                ]
        images = [{"bytes": content(folder, name), "path": name} for name in talk["images"]]
        rows.append(
            {"id": talk["id"], "type": talk["type"], turns_key: record[turns_key], "images": images}
        )
    return rows


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=16)
    return path


def write_arrow(path: Path, rows: list[dict], shards: int = 2) -> Path:
    """Writes the folder that datasets.save_to_disk writes."""
    path.mkdir()
    names = [f"data-{shard:05}-of-{shards:05}.arrow" for shard in range(shards)]
    schema = pa.Table.from_pylist(rows).schema
    size = -(-len(rows) // shards)
    for shard, name in enumerate(names):
        table = pa.Table.from_pylist(rows[shard * size : (shard + 1) * size], schema)
        with pa.ipc.new_stream(str(path / name), schema) as stream:
            stream.write_table(table, max_chunksize=10)
    files = [{"filename": name} for name in names]
    (path / "state.json").write_text(json.dumps({"_data_files": files, "_split": None}))
    (path / "dataset_info.json").write_text("{}")
    return path


def write_tar(path: Path, folder: Path, records: list[dict], images: list[list[str]]) -> Path:
    """Writes a webdataset shard of JSON records and the images of each."""
    with tarfile.open(path, "w") as shard:

        def add(name: str, data: bytes):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))

        for number, (record, names) in enumerate(zip(records, images, strict=True)):
            for k, name in enumerate(names):
                add(f"shard.d/{number:04}.{k}.png", content(folder, name))
            add(f"shard.d/{number:04}.json", json.dumps(record).encode())
    return path


def write_table(path: Path, talks: list[dict], delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        columns = ["id", "type", "image", "question", "answer"]
        writer = csv.DictWriter(file, columns, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(map(question_answer, talks))
    return path


def write_json(path: Path, records: list[dict]) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, records: list[dict]) -> Path:
    """Writes JSON Lines as a Windows editor would."""
    lines = "\r\n\r\n".join(map(json.dumps, records))
    path.write_bytes(f"\ufeff{lines}\r\n".encode())
    return path


def write_forms(folder: Path, talks: list[dict]) -> dict[str, Path]:
    """Writes conversations in every form that can hold them; returns the path of each."""
    images = [talk["images"] for talk in talks]
    return {
        "llava": write_json(folder / "llava.json", list(map(llava, talks))),
        "llava lines": write_lines(folder / "llava.jsonl", list(map(llava, talks))),
        "sharegpt": write_json(folder / "sharegpt.json", list(map(sharegpt, talks))),
        "openai": write_json(folder / "openai.json", list(map(openai, talks))),
        "openai data URLs": write_lines(
            folder / "data.jsonl", [openai(talk, data_url(folder)) for talk in talks]
        ),
        "openai file URLs": write_lines(
            folder / "files.jsonl", [openai(talk, file_url(folder)) for talk in talks]
        ),
        "parquet": write_parquet(
            folder / "a.parquet", column_records(folder, talks, "conversations")
        ),
        "parquet messages": write_parquet(
            folder / "b.parquet", column_records(folder, talks, "messages")
        ),
        "arrow": write_arrow(folder / "saved", column_records(folder, talks, "messages")),
        "webdataset": write_tar(folder / "shard.tar", folder, list(map(llava, talks)), images),
    }


def write_simple_forms(folder: Path, talks: list[dict]) -> dict[str, Path]:
    """Writes conversations of one question in every form that holds questions and answers."""
    records = list(map(question_answer, talks))
    rows = []
    for talk, record in zip(talks, records):
        image = {"bytes": content(folder, talk["images"][0])} if talk["images"] else None
        rows.append({**record, "image": image})
    return {
        "llava": write_json(folder / "llava.json", list(map(llava, talks))),
        "csv": write_table(folder / "a.csv", talks),
        "tsv": write_table(folder / "a.tsv", talks, "\t"),
        "json": write_lines(folder / "qa.jsonl", records),
        "parquet": write_parquet(folder / "qa.parquet", rows),
        "arrow": write_arrow(folder / "qa", rows),
        "webdataset": write_tar(
            folder / "qa.tar", folder, records, [talk["images"] for talk in talks]
        ),
    }
