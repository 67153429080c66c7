"""A sweep of learning rates is committed, and the study takes the best candidate of each arm."""

import json
from dataclasses import replace

import pytest

from tests.study import studies
from vlm_jax.config import ConfigError
from vlm_jax.study import cli, definition, planning, tuning
from vlm_jax.study.report import results, scores
from vlm_jax.study.run import running
from vlm_jax.study.tuning import Sweep

LOW, HIGH = {"optim.learning_rate": 0.1}, {"optim.learning_rate": 0.5}
TUNE = {"shuffle": [LOW, HIGH, {"optim.kind": "muon"}]}


@pytest.fixture
def study(datasets_dir, monkeypatch):
    """A study that any file defines."""
    study = studies.study(datasets_dir, matched={"examples": None}, tune=TUNE)
    monkeypatch.setattr(definition, "load", lambda file: study)
    return study


def sweep(*values, metric="exact_match", candidates=TUNE["shuffle"]):
    return Sweep(metric, {"shuffle": list(zip(candidates, values))}, "2026-11-30", "tune it")


def rates(study):
    return study.arms["shuffle"].get("optim.learning_rate")


def test_the_sweep_trains_every_candidate_on_the_validation_split(study, tmp_path):
    plan = planning.build_plan(tuning.sweep_study(study), tmp_path, False, {})
    runs = {run.arm: run.cfg for run in plan.runs()}
    assert list(runs) == ["shuffle+0", "shuffle+1", "shuffle+2"]
    assert {cfg.eval.split for cfg in runs.values()} == {"validation"}
    assert {cfg.seed for cfg in runs.values()} == {tuning.SEED}
    assert {cfg.projector.kind for cfg in runs.values()} == {"pixel_shuffle"}
    assert [cfg.optim.learning_rate for cfg in runs.values()][:2] == [0.1, 0.5]
    assert runs["shuffle+2"].optim.kind == "muon"


def test_the_best_candidate_is_taken_and_a_failed_one_is_not(study):
    assert rates(tuning.apply(study, sweep(0.2, 0.7, 0.1))) == 0.5
    assert rates(tuning.apply(study, sweep(0.2, None, 0.1))) == 0.1
    base = studies.override(study.base, {"eval.metrics": ("exact_match", "nats")})
    losses = replace(study, base=base, metric="nats")
    assert rates(tuning.apply(losses, sweep(0.2, 0.7, 0.3, metric="nats"))) == 0.1
    assert rates(tuning.apply(study, None)) == 0.1, "the first, until there is a sweep"
    assert tuning.apply(study, sweep(0.1, 0.1, 0.1)).arms["linear"] == {}


def test_a_sweep_of_another_study_is_refused(study):
    with pytest.raises(ConfigError, match="tune of arm shuffle had other candidates"):
        tuning.apply(study, sweep(0.1, 0.2, candidates=[LOW, HIGH]))
    with pytest.raises(ConfigError, match="the sweep is of nats, not exact_match"):
        tuning.apply(study, sweep(0.1, 0.2, 0.3, metric="nats"))
    with pytest.raises(ConfigError, match="no candidate of arm shuffle has a score"):
        tuning.apply(study, sweep(None, None, None))


def test_the_command_writes_the_file_that_the_study_reads(study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shares = {"shuffle+0": 0.25, "shuffle+1": 0.75, "shuffle+2": 0.5}
    trained = []

    def work(queue, jobs):
        for run in queue._waiting:
            trained.append(run.arm)
            studies.write_run(run, shares[run.arm])

    monkeypatch.setattr(running.Queue, "work", work)
    assert cli.main(["tune", "mine.py", "--quick"]) == 0
    assert not (tmp_path / "rates").exists()
    assert cli.main(["tune", "mine.py"]) == 0
    assert trained == 2 * list(shares)
    output = capsys.readouterr().out
    assert "shuffle: exact_match 0.7" in output and output.count("  chosen") == 2
    stored = json.loads((tmp_path / "rates/mine.json").read_text())
    assert (stored["split"], stored["seed"], stored["metric"]) == (
        "validation",
        1000,
        "exact_match",
    )
    options = cli.parse_options("report", ["mine.py"])
    assert rates(cli.load_study(options)) == 0.5
    (tmp_path / "rates/mine.json").write_text('{"arms": 3}')
    assert cli.main(["run", "mine.py"]) == 2
    assert "mine.json is damaged" in capsys.readouterr().err


def test_the_report_shows_all_candidates(study, tmp_path):
    plan = planning.build_plan(study, tmp_path, False, {})
    found = results.read_results(plan)
    section = scores.sweep_section(found, sweep(0.2, 0.7, None))
    rows = [[cell.text for cell in row] for row in section.tables[0].rows]
    assert rows == [
        ["shuffle", "optim.learning_rate 0.1", "0.2000", ""],
        ["shuffle", "optim.learning_rate 0.5", "0.7000", "chosen"],
        ["shuffle", "optim.kind muon", "failed", ""],
    ]
    assert section.pictures[0].png.startswith(b"\x89PNG")
    assert "seed 1000" in section.text[0] and "2026-11-30" in section.text[0]
    assert "Not tuned yet" in scores.sweep_section(found, None).text[0]
