"""A study that is run really: killed in the middle it goes on, and a failed arm stops no other."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.study import studies
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.study import cli, definition, planning
from vlm_jax.study.report import results
from vlm_jax.study.run import (
    measuring,
    preparing,
    record,
    running,
)
from vlm_jax.study.run.folder import Folder
from vlm_jax.study.run.running import Queue

FILE = """
from tests.study import studies


def get_study():
    study = studies.study({datasets!r}, matched={{"examples": ""}})
    return studies.with_cache(study, {cache!r})
"""
PATIENCE_SECONDS = 300


@pytest.fixture
def file(tmp_path, datasets_dir, monkeypatch):
    """A study of two arms and two seeds whose costs are known already: it is `measuring` that finds them out."""
    monkeypatch.chdir(tmp_path)
    flags = os.environ["XLA_FLAGS"].split()  # for a run, one device is enough, and compiles faster
    monkeypatch.setenv("XLA_FLAGS", " ".join(flag for flag in flags if "device_count" not in flag))
    file = tmp_path / "mine.py"
    file.write_text(FILE.format(datasets=datasets_dir, cache=str(tmp_path / "compiled")))
    for name in ("linear", "shuffle"):
        measured = Folder(tmp_path / "runs/studies/mine").measurement(name)
        measured.parent.mkdir(parents=True, exist_ok=True)
        measured.write_text(json.dumps(studies.MEASURED))
    return file


def test_a_study_that_is_killed_goes_on_where_it_was(file, tmp_path, capsys):
    command = [
        sys.executable,
        str(record.ROOT / "experiments/study.py"),
        "run",
        str(file),
        "--jobs",
        "2",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(record.ROOT)}
    )
    runs = tmp_path / "runs/studies/mine/examples"
    first = runs / "linear/seed_0/eval.json"
    begun = time.monotonic()
    while (
        not first.exists()
        and time.monotonic() < begun + PATIENCE_SECONDS
        and process.poll() is None
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    done = first.stat().st_mtime_ns
    assert not (runs / "shuffle/seed_1/eval.json").exists()

    assert cli.main(["run", str(file), "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "of 4 runs are done\n" in printed and "[4/4]" in printed
    assert first.stat().st_mtime_ns == done
    for arm in ("linear", "shuffle"):
        for seed in (0, 1):
            workdir = Workdir(str(runs / arm / f"seed_{seed}"))
            lines = [json.loads(line)["step"] for line in workdir.metrics.read_text().splitlines()]
            assert lines == list(range(1, 7))
            assert workdir.predictions.exists()
    assert cli.main(["report", str(file)]) == 0
    assert "| linear |" in (tmp_path / "runs/studies/mine/report/report.md").read_text()


def test_what_a_model_costs_is_measured(datasets_dir, tmp_path):
    cfg = dataclasses.replace(studies.base(datasets_dir), workdir=str(tmp_path / "none"))
    found = measuring.measure(cfg)
    assert set(found) == set(studies.MEASURED)
    assert found["step_seconds"] > 0
    assert found["decoded_tokens_per_second"] > 0
    assert found["peak_memory_bytes"] > 2**26
    assert found["data_sha256"] == measuring.data_hash(cfg)
    other = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seed=1))
    assert measuring.data_hash(other) != found["data_sha256"]
    assert not (tmp_path / "none").exists()


@pytest.fixture
def queue(datasets_dir, tmp_path, monkeypatch):
    """`queue(script)`: the runs of a study whose processes are a line of Python; `W` is the work folder."""

    def make(script):
        plan = planning.plan(
            studies.study(datasets_dir, matched={"examples": ""}, seeds=1), tmp_path, False, {}
        )
        monkeypatch.setattr(
            running,
            "command",
            lambda *words: [sys.executable, "-c", f"import sys; W = {words[-1]!r}\n{script}"],
        )
        return Queue(plan.runs(), dict.fromkeys(plan.runs(), 1.0)), plan

    return make


SUCCEED = "open(W + '/eval.json', 'w').close()"


def test_a_failed_arm_stops_no_other_and_is_noted_with_its_error(queue, capsys):
    made, plan = queue(f"if 'linear' in W: sys.exit('error: the loss is nan.')\n{SUCCEED}")
    made.work(jobs=1)
    assert [run.arm for run in made.failed] == ["linear"]
    assert running.is_done(plan.runs()[1])
    printed = capsys.readouterr().out
    assert "[1/2] examples/linear/seed_0  failed: exit code 1: error: the loss is nan." in printed
    assert "[2/2] examples/shuffle/seed_0  done" in printed
    assert record.read(plan.runs()[0].cfg.workdir)["error"] == "error: the loss is nan."


def test_what_cannot_be_made_ready_stops_no_run(datasets_dir, tmp_path, monkeypatch, capsys):
    """A model that cannot be measured, and a first run that fails: the runs that need it fail, and say why."""
    first, arms = (
        {"text": {"fusion.kind": "text_only"}},
        {"new": {}, "taught": {"decoder.checkpoint": "{text}"}},
    )
    settings = {
        "first": first,
        "arms": arms,
        "reference": "new",
        "matched": {"examples": ""},
        "seeds": 1,
    }
    study = studies.study(datasets_dir, **settings)
    script = (
        f"import sys; W = sys.argv[-1]\nif '/first/' in W: sys.exit('error: no room.')\n{SUCCEED}"
    )
    monkeypatch.setattr(
        running, "command", lambda *words: [sys.executable, "-c", script, words[-1]]
    )
    monkeypatch.setattr(preparing, "sys", SimpleNamespace(executable="false"))
    monkeypatch.setattr(definition, "load", lambda file: study)
    assert cli.main(["run", "mine.py", "--folder", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "first text failed with exit code 1: error: no room." in printed
    assert "measuring new failed" in printed and "measuring taught failed" in printed
    plan = planning.plan(study, tmp_path, False, {})
    new, taught = plan.runs()
    assert running.is_done(new) and not running.is_done(taught)
    found = results.read(plan).missing[taught.name]
    assert found.startswith("failed: ") and "text_exported" in found


def test_every_attempt_is_kept_with_the_commit_that_it_began_at(queue, monkeypatch):
    _, plan = queue(SUCCEED)
    for commit in ("one", "two"):
        monkeypatch.setattr(record, "environment", lambda commit=commit: {"commit": commit})
        process = running.Process(plan.runs()[0])
        monkeypatch.setattr(record, "environment", lambda: {"commit": "made while it ran"})
        process.note()
    assert [one["commit"] for one in record.read(plan.runs()[0].cfg.workdir)["attempts"]] == [
        "one",
        "two",
    ]


def test_a_run_whose_record_is_damaged_fails_alone_and_keeps_it(queue, capsys):
    made, plan = queue(SUCCEED)
    first, second = plan.runs()
    file = Path(first.cfg.workdir) / record.RECORD
    file.parent.mkdir(parents=True)
    file.write_text("[")
    made.work(jobs=1)
    assert made.failed == [first] and running.is_done(second)
    assert "run.json cannot be read" in capsys.readouterr().out
    assert file.read_text() == "["
    assert "run.json cannot be read" in results.read(plan).missing[first.name]


def test_a_run_that_another_process_finished_is_not_run_again(queue, capsys):
    made, plan = queue("raise SystemExit('it ran')")
    for run in plan.runs():
        Path(run.cfg.workdir).mkdir(parents=True)
        Workdir(run.cfg.workdir).eval.write_text("{}")
    made.work(jobs=1)
    assert not made.failed and capsys.readouterr().out.count("is done") == 2


def test_a_run_that_was_preempted_is_continued(queue):
    made, plan = queue(
        f"import os\nif not os.path.exists(W + '/t'): open(W + '/t', 'w'); sys.exit(75)\n{SUCCEED}"
    )
    made.work(jobs=2)
    assert not made.failed
    codes = [
        [one["exit_code"] for one in record.read(run.cfg.workdir)["attempts"]]
        for run in plan.runs()
    ]
    assert codes == [[75, 0], [75, 0]]


def test_a_run_that_was_stopped_is_no_failure_to_the_report(queue):
    _, plan = queue("print('error: stopped by SIGTERM.'); sys.exit(75)")
    run = plan.runs()[0]
    process = running.Process(run)
    while process.exit_code() is None:
        time.sleep(0.01)
    process.note()
    assert results.read(plan).missing[run.name] == "stopped, to be continued"


def test_a_run_that_another_process_trains_is_left_alone(queue, capsys):
    made, plan = queue(SUCCEED)
    workdir = Workdir(plan.runs()[0].cfg.workdir)
    with workdir.locked():
        made.work(jobs=1)
    assert [run.arm for run in made.failed] == ["linear"]
    assert "is in use: another process trains there" in capsys.readouterr().out
    assert not workdir.config.exists()


def test_an_error_is_found_in_what_a_process_said(tmp_path):
    log = tmp_path / "log.txt"
    assert record.last_error(log) == ""
    log.write_text(
        "step 1\nTraceback\n  x\nValueError: no\n----\nFor simplicity, JAX has removed\n"
    )
    assert record.last_error(log) == "ValueError: no"
    log.write_text("step 1\nKilled\n\n")
    assert record.last_error(log) == "Killed"
