"""Datasets of records are prepared by TFDS and read by index; a new one is a class and a row."""

import contextlib
import functools
import io
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from vlm_jax.config import ConfigError, Data, UserError
from vlm_jax.config.datasets import DATASETS, Dataset
from vlm_jax.config.validate import validate
from vlm_jax.data import conversations, pipeline, questions, sources
from vlm_jax.testing import tiny, write_conversations

RECIPE = Path(__file__).parents[2] / "docs" / "datasets.md"


@pytest.mark.parametrize(
    ("split", "images", "questions"), [("train", 4000, 38_575), ("test", 1000, 9_673)]
)
def test_counts_and_order(datasets_dir, split, images, questions):
    records = sources.load(Data(dir=datasets_dir), split)
    assert len(records) == images
    read = [records[i] for i in range(len(records))]
    assert [record.image_id for record in read] == list(range(images))
    assert sum(len(record.questions) for record in read) == questions


def test_a_record_is_that_of_the_package(datasets_dir):
    import easy_vqa

    record = sources.load(Data(dir=datasets_dir), "test")[17]
    expected = [
        (q, a) for q, a, image in zip(*easy_vqa.get_test_questions(), strict=True) if image == 17
    ]
    assert list(zip(record.questions, record.answers, strict=True)) == expected
    assert Image.open(io.BytesIO(record.image)).size == (64, 64)
    with open(easy_vqa.get_test_image_paths()[17], "rb") as file:
        assert record.image == file.read()


def test_types_follow_from_the_answers(datasets_dir):
    records = sources.load(Data(dir=datasets_dir), "test")
    answers = {"yes_no": set(), "shape": set(), "color": set()}
    counts = Counter()
    for i in range(len(records)):
        for answer, kind in zip(records[i].answers, records[i].types, strict=True):
            answers[kind].add(answer)
            counts[kind] += 1
    assert answers["yes_no"] == {"yes", "no"}
    assert answers["shape"] == {"circle", "rectangle", "triangle"}
    assert answers["color"] == {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
    assert counts == {"yes_no": 7136, "shape": 1257, "color": 1280}


def test_slices(datasets_dir):
    data = Data(dir=datasets_dir)
    assert len(sources.load(data, "train[:90%]")) == 3600
    assert sources.load(data, "train[90%:]")[0].image_id == 3600


NO_SPLITS = dict.fromkeys(
    ["nonsense", "train[", "train[:x]", ""], "does not exist: choose train, test, or a"
)
EMPTY = dict.fromkeys(
    ["train[:0]", "train[5:2]", "test[:0%]"], "is an empty split: .* train 4000, test 1000"
)


@pytest.mark.parametrize("split, said", (NO_SPLITS | EMPTY).items(), ids=NO_SPLITS | EMPTY)
def test_a_bad_split_names_its_field(datasets_dir, split, said):
    with pytest.raises(UserError, match=f"data.train_split {re.escape(repr(split))} {said}"):
        sources.load(Data(dir=datasets_dir, train_split=split), split)
    with pytest.raises(UserError, match=f"eval.split {re.escape(repr(split))} {said}"):
        sources.load(Data(dir=datasets_dir), split)


def test_an_unknown_source_lists_the_choices(datasets_dir):
    with pytest.raises(
        ConfigError, match=r"data.source 'easy_vqq'.*perhaps you meant easy_vqa.*choose"
    ):
        sources.load(Data(source="easy_vqq", dir=datasets_dir), "train")


def test_an_unusable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"data.dir .*file"):
            sources.load(Data(dir=str(directory)), "train")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("files", ["*-train.array_record*", "dataset_info.json"])
@pytest.mark.parametrize("damage", [cut, os.remove])
def test_a_damaged_dataset_is_named(datasets_dir, tmp_path, files, damage):
    directory = shutil.copytree(datasets_dir, tmp_path / "copy")
    for path in directory.rglob(files):
        damage(path)
    with pytest.raises(UserError, match=str(directory)):
        list(sources.load(Data(dir=str(directory)), "train"))


@pytest.mark.parametrize("fails", [False, True])
def test_no_temporary_folder_is_left(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = write_conversations(tmp_path / "talks", 3)
    if fails:
        (tmp_path / "talks" / "1_0.jpg").write_bytes(b"")
    with contextlib.suppress(UserError):
        conversations.load(data, "train")
    assert [path.name for path in tmp_path.iterdir()] == ["talks"]


@functools.cache
def recipe() -> tuple[ModuleType, Dataset]:
    """The class and the row of the recipe in docs/datasets.md; a class is registered once."""
    class_code, row_code = re.findall(r"```python\n(.*?)```", RECIPE.read_text(), re.DOTALL)
    module = ModuleType("vlm_jax.data.builders.stripes")
    exec(class_code, module.__dict__)
    return module, eval(f"{{{row_code}}}", {"Dataset": Dataset})["stripes"]


@pytest.fixture
def stripes(tmp_path, monkeypatch) -> Data:
    """The dataset of the recipe, added as the recipe says."""
    module, row = recipe()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(DATASETS, "stripes", row)
    sizes = {"questions_per_row": 2, "text_length": 48}
    return Data(source="stripes", dir=str(tmp_path), augment=(), **sizes)


def test_a_dataset_is_one_class_and_one_row(stripes):
    """The recipe is followed literally: the new dataset is trained on, evaluated and validated."""
    cfg = validate(tiny(data=stripes))
    tokenizer = pipeline.train_tokenizer(cfg)
    batch = next(pipeline.training_iterator(cfg, tokenizer))
    assert batch.images.shape == (8, 1, 16, 16, 3)
    for row in range(8):
        is_scored = batch.loss_weights[row] > 0
        answers = "".join(tokenizer.decode([i]) for i in batch.targets[row][is_scored])
        dark_left = batch.images[row, 0, :, :8].mean() < batch.images[row, 0, :, 8:].mean()
        assert sorted(answers) == sorted("leftyes" if dark_left else "rightno")
    assert [one.answer for one in questions.load(cfg, "test", 3)] == ["left", "yes", "right"]
    assert pipeline.fingerprint(cfg.data) == {
        "stripes": "stripes/1.0.0",
        "stripes, split train": "80",
        "stripes, split test": "20",
    }


def test_the_row_of_a_dataset_decides_which_fields_it_takes(stripes, monkeypatch):
    refused = {
        "seed": (replace(stripes, seed=3), "data.seed applies only to data.source glyphs and"),
        "augment": (replace(stripes, augment=("mirror",)), "data.augment mirror would invalidate"),
        "files": (replace(stripes, files=("a.json",)), "data.files applies only to data.source"),
        "name": (replace(stripes, source="stripes:wide"), "data.source 'stripes:wide' is unknown"),
    }
    for data, message in refused.values():
        with pytest.raises(ConfigError, match=message):
            validate(tiny(data=data))
    row = replace(DATASETS["stripes"], fields=("seed",), allows_augment=True, takes_name=True)
    monkeypatch.setitem(DATASETS, "stripes", row)
    validate(tiny(data=replace(stripes, source="stripes:wide", seed=3, augment=("mirror",))))


@pytest.mark.parametrize("key", DATASETS)
def test_a_row_names_fields_of_data_and_one_way_to_read_it(key):
    row = DATASETS[key]
    assert set(row.fields) <= {field.name for field in fields(Data)}
    assert (row.builder is None) != (row.conversations is None)


@pytest.mark.parametrize("key", DATASETS)
def test_every_dataset_is_documented(key):
    source = f"{key}:NAME" if DATASETS[key].takes_name else key
    assert f"| `{source}` |" in RECIPE.read_text()
