"""A mistake in a study is one sentence that names it, with exit code 2, and writes nothing."""

from pathlib import Path

import pytest

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


def run(arguments, capsys):
    """Returns the exit code and the message of a command."""
    code = cli.main(arguments)
    return code, capsys.readouterr().err


FIELDS = {
    "an unknown field": (
        "arms={'linear': {}, 'b': {'projector.knd': 'mlp'}}",
        ["arm b", "meant projector.kind"],
    ),
    "an unknown choice": (
        "arms={'linear': {}, 'b': {'projector.kind': 'mpl'}}",
        ["arm b", "projector.kind 'mpl'"],
    ),
    "an unknown axis": (
        "matched={'flops': None}",
        ["matched 'flops' is not an axis", "training_flops, parameters"],
    ),
    "an unknown reference": (
        "reference='linaer'",
        ["'linaer' is not an arm", "perhaps you meant linear"],
    ),
    "a solved field that is not an integer": (
        "matched={'examples': 'projector.kind'}",
        ["is not an integer field"],
    ),
    "an unknown solved field": (
        "matched={'examples': 'train.step'}",
        ["perhaps you meant train.steps"],
    ),
    "seconds by another field": (
        "matched={'seconds': 'decoder.depth'}",
        ["can only be solved for train.steps"],
    ),
    "an empty field": ("matched={'examples': ''}", ["matched examples is solved for ''", "(None:"]),
    "no axis": ("matched={}", ["matched has no axis"]),
    "one arm": ("arms={'linear': {}}", ["a comparison needs 2"]),
    "a name that cannot be a folder": (
        "arms={'linear': {}, 'a/b': {'seed': 1}}",
        ["invalid name 'a/b'"],
    ),
    "a seed of an arm": ("arms={'linear': {}, 'b': {'seed': 1}}", ["seed is set by the study"]),
    "an unknown metric": ("metric='accuracy'", ["metric 'accuracy'", "exact_match"]),
    "a metric that is not computed": (
        "metric='anls'",
        ["metric anls needs anls in eval.metrics: add it"],
    ),
    "an unknown prerequisite": (
        "arms={'linear': {}, 'b': {'decoder.checkpoint': '{text}'}}",
        ["is not a prerequisite"],
    ),
    "a prerequisite for another field": (
        "prerequisites={'text': {}}, arms={'linear': {}, 'b': {'init_from': '{text}'}}",
        ["arm b: init_from {text} cannot be a prerequisite: only vision.checkpoint"],
    ),
    "an encoder of a prerequisite without one": (
        "prerequisites={'text': {'fusion.kind': 'text_only'}}, "
        "arms={'linear': {}, 'b': {'vision.checkpoint': '{text}'}}",
        ["vision.checkpoint {text}: the prerequisite is text_only and has no vision"],
    ),
    "arms whose pretrained parts differ": (
        "prerequisites={'text': {}, 'other': {}}, arms={'linear': {'decoder.checkpoint': '{text}'},"
        " 'b': {'decoder.checkpoint': '{other}'}}",
        ["arms linear and b start from different checkpoints", "{text} and {other}"],
    ),
    "versions of a prerequisite that differ in what is taken": (
        "prerequisites={'text': [{}, {'decoder.depth': 3}]}, "
        "arms={'linear': {}, 'b': {'decoder.checkpoint': '{text}'}}",
        ["decoder.checkpoint {text}: the versions of the prerequisite differ in decoder"],
    ),
    "a prerequisite that is a number": ("prerequisites={'text': 3}", ["prerequisite text is 3"]),
    "a probe of another model": (
        "probes={'wide': {'vision.width': 64}}",
        ["probe wide changes vision.width to 64, but the run is trained"],
    ),
    "a probe without the study's metric": (
        "probes={'text': {'eval.metrics': ('anls',)}}",
        ["probe text: metric exact_match needs exact_match in eval.metrics"],
    ),
    "a probe that an arm cannot answer": (
        "probes={'text': {'fusion.kind': 'text_only', 'data.text_length': 999}}",
        ["probe text: arm linear cannot answer it:", "999"],
    ),
    "a contrast over an unknown probe": (
        "contrasts={'c': studies.Contrast('shuffle@text:nats - linear', '> 0', 'a paper')}",
        ["contrast c: the sum's 'text' is not a probe"],
    ),
    "tuning on the test split": (
        "tune={'linear': [{'optim.learning_rate': 0.1, 'eval.split': 'test'}]}",
        ["tune of arm linear sets eval.split to 'test'", "the test split is for the final number"],
    ),
    "reporting the split of the choices": (
        "tune={'linear': [{'optim.learning_rate': 0.1}]}, "
        "base=studies.override(studies.base('d'), {'eval.split': 'validation'})",
        ["tune chooses on the split validation, which is also eval.split"],
    ),
    "a rate of an unknown arm": (
        "tune={'liner': [{'optim.learning_rate': 0.1}]}",
        ["tune 'liner' is not an arm (perhaps you meant linear)"],
    ),
    "no candidates": ("tune={'linear': []}", ["tune of arm linear has no candidates"]),
    "a candidate that is a number": ("tune={'linear': [3]}", ["tune of arm linear is 3"]),
    "rates that are not chosen yet": (
        "tune={'linear': [{'optim.learning_rate': 0.1}]}",
        ["rates/mine.json does not exist", "python experiments/study.py tune "],
    ),
    "a tolerance above 1": ("tolerance=2", ["tolerance is 2"]),
    "seeds in words": ("seeds='3'", ["seeds is '3'", "an integer"]),
    "a tolerance in words": ("tolerance='0.1'", ["tolerance is '0.1'", "a number"]),
    "arms without fields": ("arms=['linear', 'mlp']", ["arms is ['linear', 'mlp']", "a dict"]),
    "an arm that is a list": (
        "arms={'linear': {}, 'b': ['mlp']}",
        ["arm b is ['mlp']", "a dict of fields"],
    ),
    "a number for a name": ("arms={'linear': {}, 3: {}}", ["invalid name 3"]),
    "a field that no axis grows with": (
        "matched={'image_tokens': 'train.steps'}, "
        "arms={'linear': {}, 'b': {'projector.kind': 'pixel_shuffle'}}",
        ["arm b cannot be matched in image_tokens", "train.steps cannot be solved for"],
    ),
    "an end that depends on the scores": (
        "base=studies.override(studies.base('d'), {'train.patience': 2, 'eval.every_steps': 2, "
        "'eval.splits': ('val=train[:9]',)})",
        ["train.patience 2 would end the arms after different numbers of steps"],
    ),
    "no split to be asked about": (
        "base=studies.override(studies.base('d'), {'eval.split': ''})",
        ["no eval.split"],
    ),
    "a contrast over an unknown arm": (
        "contrasts={'c': studies.Contrast('shufle - linear', '> 0', 'a paper')}",
        ["contrast c: the sum's 'shufle' is not an arm (perhaps you meant shuffle)"],
    ),
    "a contrast without spaces": (
        "contrasts={'c': studies.Contrast('shuffle-linear', '> 0', 'a paper')}",
        ["contrast c: the sum's 'shuffle-linear' is not an arm"],
    ),
    "a contrast with an open bracket": (
        "contrasts={'c': studies.Contrast('(shuffle - linear', '> 0', 'a paper')}",
        ["contrast c: '(shuffle - linear' is not a sum of arms"],
    ),
    "a contrast that does not add up to 0": (
        "contrasts={'c': studies.Contrast('shuffle + linear', '> 0', 'a paper')}",
        ["contrast c: the coefficients", "add up to 2, but must add up to 0"],
    ),
    "a contrast with another sign": (
        "contrasts={'c': studies.Contrast('shuffle - linear', 'better', 'a paper')}",
        ["contrast c: published 'better' is not a sign", "> 0, < 0, = 0"],
    ),
    "an equality without a margin": (
        "contrasts={'c': studies.Contrast('shuffle - linear', '= 0', 'a paper')}",
        ["contrast c: margin is None", "'= 0' needs one"],
    ),
    "a contrast without a source": (
        "contrasts={'c': studies.Contrast('shuffle - linear', '> 0', '')}",
        ["contrast c: source is empty"],
    ),
    "a contrast of a score that is not computed": (
        "contrasts={'c': studies.Contrast('shuffle@anls - linear@anls', '> 0', 'a paper')}",
        ["contrast c: score anls needs anls in eval.metrics"],
    ),
    "many contrasts": (
        "contrasts=dict.fromkeys('abcd', studies.Contrast('shuffle - linear', '> 0', 'a paper'))",
        ["contrasts has 4 entries, but at most 3"],
    ),
    "equal arms": (
        "arms={'linear': {}, 'b': {'projector.kind': 'linear'}}",
        ["linear and b are identical"],
    ),
    "an arm that cannot be matched": (
        "arms={'linear': {}, 'b': {'train.batch_size': 16}}",
        ["b misses examples by +100.0%", "solves for no field", "tolerance 10.0%"],
    ),
}


@pytest.mark.parametrize(("fields", "words"), FIELDS.values(), ids=FIELDS)
def test_a_mistake_in_a_study_is_refused_and_writes_nothing(fields, words, write, folder, capsys):
    code, error = run(["run", write(fields)], capsys)
    assert code == 2
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == ["mine.py"]


TEXTS = {
    "a study that raises": ("1 / 0", "could not be loaded: ZeroDivisionError"),
    "a study without get_study": ("x = 1", "has no get_study() that returns"),
    "a study of nothing": ("def get_study():\n    return 3", "has no get_study() that returns"),
    "a study that ends the program": ("raise SystemExit(0)", "could not be loaded: SystemExit"),
    "a long study": ("x = 1\n" * 91, "has 91 lines, but at most 90"),
}


@pytest.mark.parametrize(("text", "words"), TEXTS.values(), ids=TEXTS)
def test_a_file_without_a_study_is_refused(text, words, write, capsys):
    code, error = run(["run", write(text=text)], capsys)
    assert code == 2
    assert words in error


ARGUMENTS = {
    "an unknown command": (["rnu"], "perhaps you meant run"),
    "an unknown arm": (
        ["run", "mine.py", "--arms", "linear,shufle"],
        "'shufle' is not an arm (perhaps you meant shuffle)",
    ),
    "a shard beyond the last": (["run", "mine.py", "--shard", "9/8"], "--shard 9/8 is invalid"),
    "a shard that is not a fraction": (["run", "mine.py", "--shard", "a"], "--shard a is invalid"),
    "no seeds": (["run", "mine.py", "--seeds", "0"], "--seeds is 0"),
    "an unknown option": (["run", "mine.py", "--sharp"], "--sharp"),
    "a file that does not exist": (["run", "mein.py"], "perhaps you meant mine.py"),
    "a report of an empty folder": (["report", "mine.py"], "holds no study: run it first"),
}


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_mistake_in_a_command_is_refused(arguments, words, write, folder, capsys):
    write()
    code, error = run(arguments, capsys)
    assert code == 2
    assert words in error
    assert not (folder / "runs").exists()


def test_all_studies_are_listed_with_question_arms_and_progress(folder, capsys):
    assert cli.main(["list"]) == 0
    output = capsys.readouterr().out
    for file in definition.study_files(record.ROOT / "experiments"):
        study = definition.load(str(file))
        assert f"{file.name}: {study.question}\n  arms {', '.join(study.arms)}\n  0 of " in output
    assert "group core: cost, flip, retention\n" in output


@pytest.fixture
def trained(monkeypatch):
    """Names of the files and of the folders of runs that commands would have trained."""
    names = []
    monkeypatch.setattr(preparing, "measure_models", lambda *_: None)

    def call(command, _):
        names.append(Path(command[1]).stem)
        return 0

    def work(queue, _):
        names.extend(dict.fromkeys(Path(run.cfg.workdir).parts[2] for run in queue._waiting))

    monkeypatch.setattr(running, "call", call)
    monkeypatch.setattr(running.Queue, "work", work)
    return names


def test_a_group_runs_its_studies_one_after_the_other(folder, trained, capsys):
    assert cli.main(["run", "core", "--quick"]) == 0
    assert list(dict.fromkeys(trained)) == ["cost", "flip_quick", "retention_quick"]
    assert (folder / "runs/studies/retention_quick/study.json").exists()
    code, error = run(["run", "core", "--arms", "a"], capsys)
    assert code == 2
    assert "--arms is an option of one study, but core is the group cost, flip" in error


def test_a_mistake_in_the_last_study_of_a_group_is_found_before_the_first(
    folder, trained, monkeypatch, capsys
):
    monkeypatch.setitem(cli.GROUPS, "mine", ("cost", "none"))
    code, error = run(["run", "mine"], capsys)
    assert code == 2 and "study none is not a Python file" in error
    assert not trained and not (folder / "runs").exists()


def test_a_study_of_experiments_has_a_short_name(folder, trained):
    assert cli.main(["run", "flip", "--quick"]) == 0
    assert trained == 2 * ["flip_quick"], "prerequisites, and arms"


def test_another_version_of_the_study_is_refused_with_the_difference(
    write, folder, copy_study, capsys
):
    copy_study(folder / "runs/studies/mine")
    file = write("arms={'linear': {}, 'shuffle': {'projector.kind': 'average_pool'}}")
    for verb in ("run", "report"):
        code, error = run([verb, file], capsys)
        assert code == 2
        assert "examples/shuffle: projector.kind: pixel_shuffle -> average_pool" in error


def test_a_run_without_metrics_is_named_and_the_others_are_reported(
    write, folder, copy_study, capsys
):
    plan = copy_study(folder / "runs/studies/mine")
    Workdir(plan.runs()[0].cfg.workdir).metrics.unlink()
    code, error = run(["report", write(), "--to", "out"], capsys)
    assert code == 2
    assert "without these runs" in error and "  examples/linear/seed_0: " in error
    assert "metrics.jsonl cannot be read" in error
    assert "metrics.jsonl" in (folder / "out/report.md").read_text()


def test_the_report_repeats_the_command_with_all_options(write, folder, monkeypatch, capsys):
    monkeypatch.setattr(preparing, "measure_models", lambda *_: None)
    monkeypatch.setattr(running.Queue, "work", lambda *_: None)
    command = [
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
    assert cli.main([*command, "--shard=1/2"]) == 0
    report = f"python experiments/study.py report {command[1]} --quick --folder 'my runs'"
    assert f"{report} writes a report" in capsys.readouterr().out
    assert cli.main(["report", command[1], "--quick", "--folder", "my runs", "--to", "out"]) == 0
    markdown = (folder / "out/report.md").read_text()
    options = "--quick --folder 'my runs' --arms linear --seeds 2 --jobs 3 --shard=1/2"
    assert f"| runs | python experiments/study.py run {command[1]} {options} |" in markdown
    assert f"| report | {report} |" in markdown
    assert markdown.startswith("# Does the connector matter? (quick)")


DAMAGES = {
    "config.json": (
        lambda text: text.replace('"learning_rate": 0.001', '"learning_rate": 0.77'),
        "a run with a different config",
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
    "run.json": (lambda text: "[]", "does not hold a JSON object"),
}


def test_damaged_runs_are_named_and_left_out(write, folder, copy_study, capsys):
    """Each of the first runs has another damage."""
    plan = copy_study(folder / "runs/studies/mine")
    expected = []
    for run_of_plan, (name, (damage, words)) in zip(plan.runs(), DAMAGES.items()):
        workdir = Path(run_of_plan.cfg.workdir)
        before = (workdir / name).read_text()
        (workdir / name).write_text(damage(before))
        assert (workdir / name).read_text() != before
        expected.append((str(workdir.relative_to(plan.folder)), words))
    code, error = run(["report", write(), "--to", "out"], capsys)
    assert code == 2
    report = (folder / "out/report.md").read_text()
    for name, words in expected:
        (line,) = [line for line in error.splitlines() if line.startswith(f"  {name}: ")]
        assert words in line
        assert words in report


def test_a_damaged_study_is_named(write, folder, copy_study, capsys):
    copy_study(folder / "runs/studies/mine")
    (folder / "runs/studies/mine/study.json").write_text("{}")
    for verb in ("run", "report"):
        code, error = run([verb, write()], capsys)
        assert code == 2 and "study.json has no" in error


def test_a_metric_that_no_run_has_is_refused_with_the_choices(write, folder, copy_study, capsys):
    copy_study(folder / "runs/studies/mine")
    code, error = run(["report", write("metric='by_type.color'")], capsys)
    assert code == 2
    assert "has no by_type.color; its scores: exact_match" in error and "by_type.count" in error
