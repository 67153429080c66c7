"""A run continues with the data it was begun with, and no evaluation overwrites another."""

import json
from dataclasses import replace

import pytest

from vlm_jax.config import ConfigError, Eval, UserError
from vlm_jax.data import pipeline
from vlm_jax.runtime.workdir import LONGEST_NAME, Workdir, evaluation_name
from vlm_jax.testing import tiny, write_conversations

PRINTS = {"a.json": "1", "b.json": "2"}


@pytest.fixture
def workdir(tmp_path):
    workdir = Workdir(str(tmp_path / "run"))
    workdir.path.mkdir()
    return workdir


def test_a_checkpoint_is_named_by_its_step_or_as_the_best_or_last(workdir):
    workdir.best.write_text('{"step": 20, "metric": "val/loss"}')
    names = (None, "last", "best", "30", 40)
    assert [workdir.find_step(name) for name in names] == [None, None, 20, 30, 40]


@pytest.mark.parametrize(
    ("best", "name", "message"),
    [
        (None, "best", "step best: .* has no best.json, because the run had no validation"),
        ("{", "best", "step best: .*best.json is damaged"),
        ("{}", "best", "step best: .*best.json is damaged"),
        (None, "first", "step first: it must be best, last or the number of a step"),
        (None, -1, "step -1: it must be best"),
    ],
)
def test_a_step_that_no_checkpoint_can_have_is_refused(best, name, message, workdir):
    if best:
        workdir.best.write_text(best)
    with pytest.raises(ConfigError, match=message):
        workdir.find_step(name)


def test_a_run_continues_with_the_same_data(workdir):
    workdir.check_data(PRINTS)  # a run from before fingerprints were kept
    workdir.keep_data(PRINTS)
    workdir.check_data(dict(reversed(PRINTS.items())))


@pytest.mark.parametrize(
    "changed, named", [(PRINTS | {"b.json": "3"}, "b.json"), ({"a.json": "1"}, "b.json")]
)
def test_other_data_is_refused_by_name(changed, named, workdir):
    workdir.keep_data(PRINTS)
    with pytest.raises(
        ConfigError, match=f"was trained on other data: {named} .*data.files .* another --workdir"
    ):
        workdir.check_data(changed)


@pytest.mark.parametrize("content", ["", "{", "[]", "\0"])
def test_a_damaged_fingerprint_is_named(content, workdir):
    (workdir.path / "data.json").write_text(content)
    with pytest.raises(UserError, match="data.json .*another --workdir"):
        workdir.check_data(PRINTS)


def test_the_fingerprint_is_that_of_the_texts_alone(tmp_path):
    data = write_conversations(tmp_path / "talks", count=4)
    before = pipeline.fingerprint(data)
    other_folder = replace(data, dir=str(tmp_path / "elsewhere"))
    for image in (tmp_path / "talks").glob("*.jpg"):
        image.write_bytes(b"another image")
    assert pipeline.fingerprint(other_folder) == before
    talks = json.loads((tmp_path / "talks" / "talks.json").read_text())
    (tmp_path / "talks" / "talks.json").write_text(json.dumps(talks[::-1]))
    changed = pipeline.fingerprint(data)
    assert changed.keys() == before.keys() == set(data.files)
    assert changed != before


def test_the_fingerprint_of_a_drawn_set_is_its_configuration(tmp_path):
    data = replace(tiny().data, source="glyphs", images=(2, 1, 1), dir=str(tmp_path))
    fingerprint = pipeline.fingerprint(data)
    assert fingerprint == pipeline.fingerprint(replace(data, dir=str(tmp_path / "elsewhere")))
    assert fingerprint != pipeline.fingerprint(replace(data, seed=1))


@pytest.mark.parametrize(
    "fields, name",
    [
        ({}, "test"),
        ({"max_examples": 500}, "test_500"),
        ({"split": "train[90%:]"}, "train_90pct-"),
        ({"split": "train[:10]", "max_examples": 5}, "train_-10_5"),
        ({"files": ("data/mine.json",), "max_examples": 200}, "mine_200"),
        ({"files": ("mine.json",), "split": "train[:10]"}, "mine+train_-10"),
        ({"files": tuple(f"{letter}.jsonl" for letter in "abcde")}, "a+b+c+2_more"),
        ({"files": ("../.my talks:1.json",)}, "my_talks_1"),
        ({"files": ("x" * 200 + ".json",)}, "x" * LONGEST_NAME),
    ],
)
def test_an_evaluation_is_named_after_what_is_asked(fields, name):
    assert evaluation_name(Eval(**fields)) == name


def evaluated(folder, text):
    folder.check_writable()
    folder.keep_settings()
    folder.eval.write_text(text)
    return folder


def test_an_evaluation_with_other_settings_is_another_folder(workdir):
    cfg = tiny()
    first = evaluated(workdir.later_evaluation(cfg, 4, PRINTS), "first")
    others = [
        (replace(cfg, eval=replace(cfg.eval, max_new_tokens=3)), 4, PRINTS),
        (replace(cfg, data=replace(cfg.data, text_length=9)), 4, PRINTS),
        (cfg, 5, PRINTS),
        (cfg, 4, PRINTS | {"b.json": "3"}),
    ]
    for number, arguments in enumerate(others, 2):
        assert (
            evaluated(workdir.later_evaluation(*arguments), "another").path.name == f"test-{number}"
        )
    elsewhere = replace(cfg, data=replace(cfg.data, dir="elsewhere"))
    in_other_batches = replace(cfg, eval=replace(cfg.eval, batch_size=3))
    for same in (cfg, elsewhere, in_other_batches):
        assert workdir.later_evaluation(same, 4, PRINTS).path == first.path
    assert first.eval.read_text() == "first"


def test_evaluations_of_two_checkpoints_are_two_folders(workdir):
    cfg = replace(tiny(), init_from="a")
    first = evaluated(workdir.later_evaluation(cfg, 0, PRINTS), "first")
    larger = replace(cfg, vision=replace(cfg.vision, image_size_px=64))
    for number, other in enumerate((replace(cfg, init_from="b"), larger), 2):
        assert (
            evaluated(workdir.later_evaluation(other, 0, PRINTS), "another").path.name
            == f"test-{number}"
        )
    assert workdir.later_evaluation(cfg, 0, PRINTS).path == first.path


@pytest.mark.parametrize("name", ["eval.json", "settings.json", "notes.txt"])
def test_a_folder_of_anything_else_is_never_written_to(name, workdir):
    (workdir.path / "eval" / "test").mkdir(parents=True)
    assert workdir.later_evaluation(tiny(), 4, PRINTS).path.name == "test", "an empty one is free"
    (workdir.path / "eval" / "test" / name).write_text("mine")
    assert workdir.later_evaluation(tiny(), 4, PRINTS).path.name == "test-2"


def test_a_folder_that_cannot_be_made_is_refused(workdir):
    (workdir.path / "eval").write_text("mine")
    with pytest.raises(UserError, match="eval/test cannot be written"):
        workdir.later_evaluation(tiny(), 4, PRINTS).check_writable()
