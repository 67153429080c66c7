"""A mistake in a study is one sentence that names it, exit code 2, and nothing is written."""

from pathlib import Path

import pytest

from tests.study import studies
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.study import cli, definition
from vlm_jax.study.run import preparing, record, running

STUDY = """
from tests.study import studies

def get_study():
    return studies.study(DATASETS, FIELDS)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(folder, datasets_dir):
    """`write(fields)` writes a study file and returns its name."""

    def make(fields="", text=STUDY):
        file = folder / "mine.py"
        file.write_text(text.replace("DATASETS", repr(datasets_dir)).replace("FIELDS", fields))
        return str(file)

    return make


def said(arguments, capsys):
    code = cli.main(arguments)
    printed = capsys.readouterr()
    return code, printed.err


FIELDS = {
    "an unknown field": ("arms={'linear': {}, 'b': {'projector.knd': 'mlp'}}", ["arm b", "meant projector.kind"]),
    "an unknown choice": ("arms={'linear': {}, 'b': {'projector.kind': 'mpl'}}", ["arm b", "projector.kind 'mpl'"]),
    "an unknown axis": ("matched={'flops': ''}", ["matched 'flops' is no axis", "training_flops, parameters"]),
    "an unknown reference": ("reference='linaer'", ["'linaer' is no arm", "perhaps you meant linear"]),
    "a free field that is no number": ("matched={'examples': 'projector.kind'}", ["no field of a whole number"]),
    "an unknown free field": ("matched={'examples': 'train.step'}", ["perhaps you meant train.steps"]),
    "seconds by another field": ("matched={'seconds': 'decoder.depth'}", ["train.steps alone"]),
    "no axis": ("matched={}", ["matched names no axis"]),
    "one arm": ("arms={'linear': {}}", ["a comparison needs 2"]),
    "a name that is no folder": ("arms={'linear': {}, 'a/b': {'seed': 1}}", ["'a/b' is to be a folder"]),
    "a seed of an arm": ("arms={'linear': {}, 'b': {'seed': 1}}", ["seed is set by the study"]),
    "an unknown metric": ("metric='accuracy'", ["metric 'accuracy'", "exact_match"]),
    "a run that is not first": ("arms={'linear': {}, 'b': {'decoder.checkpoint': '{text}'}}", ["names no run of"]),
    "a tolerance that is none": ("tolerance=2", ["tolerance is 2"]),
    "seeds in words": ("seeds='3'", ["seeds is '3'", "a whole number"]),
    "a tolerance in words": ("tolerance='0.1'", ["tolerance is '0.1'", "a number"]),
    "arms without fields": ("arms=['linear', 'mlp']", ["arms is ['linear', 'mlp']", "a dict"]),
    "an arm that is a list": ("arms={'linear': {}, 'b': ['mlp']}", ["arm b is ['mlp']", "a dict of fields"]),
    "a number for a name": ("arms={'linear': {}, 3: {}}", ["the name 3 is to be a folder"]),
    "a field that no axis grows with": (
        "matched={'image_tokens': 'train.steps'}, arms={'linear': {}, 'b': {'projector.kind': 'pixel_shuffle'}}",
        ["arm b cannot be matched in image_tokens", "train.steps cannot be solved for"],
    ),
    "no split to be asked about": ("base=studies.changed(studies.base('d'), {'eval.split': ''})", ["no eval.split"]),
    "equal arms": ("arms={'linear': {}, 'b': {'projector.kind': 'linear'}}", ["linear and b are the same"]),
    "an arm that cannot be matched": (
        "arms={'linear': {}, 'b': {'train.batch_size': 16}}",
        ["b misses examples by +100.0%", "nothing is free", "tolerance 10.0%"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), FIELDS.values(), ids=FIELDS)
def test_a_mistake_in_a_study_is_refused_before_anything_is_written(
    fields, words, write, folder, capsys
):
    code, error = said(["run", write(fields)], capsys)
    assert code == 2
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == ["mine.py"]


TEXTS = {
    "a study that raises": ("1 / 0", "could not be loaded: ZeroDivisionError"),
    "a study without get_study": ("x = 1", "has no get_study() that returns"),
    "a study of nothing": ("def get_study():\n    return 3", "has no get_study() that returns"),
    "a study that ends the program": ("raise SystemExit(0)", "could not be loaded: SystemExit"),
    "a long study": ("x = 1\n" * 61, "has 61 lines: at most 60"),
}


@pytest.mark.parametrize(("text", "words"), TEXTS.values(), ids=TEXTS)
def test_a_file_that_is_no_study_is_refused(text, words, write, capsys):
    code, error = said(["run", write(text=text)], capsys)
    assert code == 2
    assert words in error


ARGUMENTS = {
    "an unknown verb": (["rnu"], "perhaps you meant run"),
    "an unknown arm": (
        ["run", "mine.py", "--arms", "linear,shufle"],
        "'shufle' is no arm (perhaps you meant shuffle)",
    ),
    "a share beyond all": (["run", "mine.py", "--shard", "9/8"], "--shard 9/8 is no share"),
    "a share of nothing": (["run", "mine.py", "--shard", "a"], "--shard a is no share"),
    "no seeds": (["run", "mine.py", "--seeds", "0"], "--seeds is 0"),
    "an unknown option": (["run", "mine.py", "--sharp"], "--sharp"),
    "a file that is not there": (["run", "mein.py"], "perhaps you meant mine.py"),
    "a report of nothing": (["report", "mine.py"], "holds no study: run it first"),
}


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_mistake_in_a_command_is_refused(arguments, words, write, folder, capsys):
    write()
    code, error = said(arguments, capsys)
    assert code == 2
    assert words in error
    assert not (folder / "runs").exists()


def test_all_studies_are_listed_with_what_they_ask_and_how_far_they_are(folder, capsys):
    assert cli.main(["list"]) == 0
    listed = capsys.readouterr().out
    for file in definition.files(record.ROOT / "experiments"):
        study = definition.load(str(file))
        assert f"{file.name}: {study.question}\n  arms {', '.join(study.arms)}\n  0 of " in listed


def test_another_version_of_the_study_is_refused_with_the_difference(
    write, folder, datasets_dir, capsys
):
    studies.pretended(studies.study(datasets_dir), folder / "runs/studies/mine")
    file = write("arms={'linear': {}, 'shuffle': {'projector.kind': 'average_pool'}}")
    for verb in ("run", "report"):
        code, error = said([verb, file], capsys)
        assert code == 2
        assert "examples/shuffle: projector.kind: pixel_shuffle -> average_pool" in error


def test_a_run_without_its_metrics_is_named_and_the_others_are_reported(
    write, folder, datasets_dir, capsys
):
    plan = studies.pretended(studies.study(datasets_dir), folder / "runs/studies/mine")
    Workdir(plan.runs()[0].cfg.workdir).metrics.unlink()
    code, error = said(["report", write(), "--to", "out"], capsys)
    assert code == 2
    assert "without these runs" in error and "  examples/linear/seed_0: " in error
    assert "metrics.jsonl cannot be read" in error
    assert "metrics.jsonl" in (folder / "out/report.md").read_text()


def test_the_report_repeats_the_command_with_every_option_that_was_given(
    write, folder, monkeypatch, capsys
):
    monkeypatch.setattr(preparing, "measure", lambda *_: None)
    monkeypatch.setattr(running.Queue, "work", lambda *_: None)
    given = [
        "run",
        write(),
        "--quick",
        "--folder",
        "my runs",
        "--arms",
        "linear",
        "--seeds",
        "2",
        "--jobs",
        "3",
    ]
    assert cli.main([*given, "--shard=1/2"]) == 0
    report = f"python experiments/study.py report {given[1]} --quick --folder 'my runs'"
    assert f"{report} writes a report" in capsys.readouterr().out
    assert cli.main(["report", given[1], "--quick", "--folder", "my runs", "--to", "out"]) == 0
    markdown = (folder / "out/report.md").read_text()
    options = "--quick --folder 'my runs' --arms linear --seeds 2 --jobs 3 --shard=1/2"
    assert f"| runs | python experiments/study.py run {given[1]} {options} |" in markdown
    assert f"| report | {report} |" in markdown
    assert markdown.startswith("# Does the connector matter? (quick)")


DAMAGES = {
    "config.json": (
        lambda text: text.replace('"learning_rate": 0.001', '"learning_rate": 0.77'),
        "another config",
    ),
    "predictions.jsonl": (
        lambda text: "",
        "is damaged: it must have lines, each with answer, correct",
    ),
    "metrics.jsonl": (
        lambda text: text.replace('"loss"', '"los"'),
        "is damaged: it must have lines, each with loss",
    ),
    "eval.json": (lambda text: text.replace("by_type", "type"), "is damaged: it must have by_type"),
    "run.json": (lambda text: "[]", "holds no JSON object"),
}


@pytest.mark.parametrize(
    ("name", "damage", "words"), [(name, *rest) for name, rest in DAMAGES.items()], ids=DAMAGES
)
def test_a_run_that_is_another_or_damaged_is_named_and_left_out(
    name, damage, words, write, folder, datasets_dir, capsys
):
    plan = studies.pretended(studies.study(datasets_dir), folder / "runs/studies/mine")
    file = Path(plan.runs()[0].cfg.workdir, name)
    before = file.read_text()
    file.write_text(damage(before))
    assert file.read_text() != before
    code, error = said(["report", write(), "--to", "out"], capsys)
    assert code == 2
    assert "  examples/linear/seed_0: " in error and words in error, error
    assert words in (folder / "out/report.md").read_text()


def test_a_damaged_study_is_named(write, folder, datasets_dir, capsys):
    studies.pretended(studies.study(datasets_dir), folder / "runs/studies/mine")
    (folder / "runs/studies/mine/study.json").write_text("{}")
    for verb in ("run", "report"):
        code, error = said([verb, write()], capsys)
        assert code == 2 and "study.json names no" in error


def test_a_metric_that_no_run_has_is_refused_with_those_that_there_are(
    write, folder, datasets_dir, capsys
):
    studies.pretended(studies.study(datasets_dir), folder / "runs/studies/mine")
    code, error = said(["report", write("metric='by_type.color'")], capsys)
    assert code == 2
    assert "has no by_type.color: it has exact_match" in error and "by_type.count" in error
