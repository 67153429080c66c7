"""Runs as processes: a stopped study continues, and a failed arm stops no other."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from tests.limits import LIMIT_SECONDS
from tests.study import studies
from vlm_jax.config import files
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.study import cli, definition, planning
from vlm_jax.study.report import results
from vlm_jax.study.run import (
    measuring,
    preparing,
    probing,
    record,
    running,
)
from vlm_jax.study.run.folder import Folder
from vlm_jax.study.run.running import Queue

FILE = """
from dataclasses import replace

from tests.study import studies
from vlm_jax.study import override


def get_study():
    study = studies.study({datasets!r}, matched={{"examples": None}}, seeds=1)
    base = override(study.base, {{"train.compilation_cache_dir": {cache!r}}})
    return replace(study, base=base)
"""


@pytest.fixture
def file(tmp_path, datasets_dir, monkeypatch):
    """A study of two arms whose costs are measured already."""
    monkeypatch.chdir(tmp_path)
    # One device is enough for a run, and compiles faster.
    flags = os.environ["XLA_FLAGS"].split()
    monkeypatch.setenv("XLA_FLAGS", " ".join(flag for flag in flags if "device_count" not in flag))
    file = tmp_path / "mine.py"
    cache = jax.config.jax_compilation_cache_dir
    file.write_text(FILE.format(datasets=datasets_dir, cache=cache))
    for name in ("linear", "shuffle"):
        measured = Folder(tmp_path / "runs/studies/mine").measurement(name)
        measured.parent.mkdir(parents=True, exist_ok=True)
        measured.write_text(json.dumps(studies.MEASUREMENT))
    return file


def test_a_stopped_study_continues_where_it_was(file, tmp_path, capsys):
    command = [
        sys.executable,
        str(record.ROOT / "experiments/study.py"),
        "run",
        str(file),
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(record.ROOT)}
    )
    runs = tmp_path / "runs/studies/mine/examples"
    first = runs / "linear/seed_0/eval.json"
    deadline = time.monotonic() + LIMIT_SECONDS
    while not first.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    done = first.stat().st_mtime_ns
    assert not (runs / "shuffle/seed_0/eval.json").exists()

    assert cli.main(["run", str(file), "--jobs", "2"]) == 0
    output = capsys.readouterr().out
    assert "1 of 2 runs are done\n" in output and "[2/2]" in output
    assert first.stat().st_mtime_ns == done
    for arm in ("linear", "shuffle"):
        workdir = Workdir(str(runs / arm / "seed_0"))
        lines = workdir.metrics.read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))
        assert workdir.predictions.exists()
    check_probe(runs / "linear/seed_0")
    assert cli.main(["report", str(file)]) == 0
    assert "| linear |" in (tmp_path / "runs/studies/mine/report/report.md").read_text()


def check_probe(workdir):
    """The decoder alone answers the questions with the text of the page before them."""
    text = {"fusion.kind": "text_only", "data.cell_px": 8, "data.transcript": True}
    probe = planning.Probe("text", text)
    cfg = Workdir(str(workdir)).read_config()
    run = planning.Run("examples", "linear", 0, cfg, (probe,))
    assert probing.main(running.make_probe_command(run, probe)[-1]) == 0
    scores = json.loads((run.probe_folder("text") / "eval.json").read_text())
    assert scores["examples"] == 16
    assert scores["exact_match"] == scores["image_shuffled_exact_match"], "no image is used"
    (asked, *_) = (run.probe_folder("text") / "predictions.jsonl").read_text().splitlines()
    assert json.loads(asked)["question"].endswith("\nhow many words are there?")


def test_a_prerequisite_of_another_study_is_taken_over(datasets_dir, tmp_path, capsys):
    """If it has the same experiment and is finished; a work folder that exists stays as it is."""
    settings = {
        "arms": {"a": {"decoder.checkpoint": "{text}"}, "b": {}},
        "reference": "b",
        "prerequisites": {"text": {"fusion.kind": "text_only"}},
        "matched": {"examples": None},
    }

    def first(name: str, **fields):
        study = studies.study(datasets_dir, **settings | fields)
        plan = planning.build_plan(study, tmp_path / name, False, {})
        runs = plan.prerequisites_of(plan.runs())
        preparing.reuse_finished(Folder(plan.folder), runs)
        return runs

    finished, stopped = first("one")
    studies.write_run(finished, 0.5)
    Workdir(stopped.cfg.workdir).open(stopped.cfg)
    same, unfinished = first("two")
    assert running.is_done(same) and not running.is_done(unfinished)
    assert f"first/text/seed_0 is copied from {finished.cfg.workdir}" in capsys.readouterr().out
    assert Workdir(same.cfg.workdir).read_config() == same.cfg
    longer = {"text": {"fusion.kind": "text_only", "train.steps": 7}}
    assert not any(map(running.is_done, first("three", prerequisites=longer)))


def test_the_costs_of_a_model_are_measured(datasets_dir, tmp_path, one_device):
    cfg = dataclasses.replace(studies.base(datasets_dir), workdir=str(tmp_path / "none"))
    costs = measuring.measure(cfg)
    assert set(costs) == set(studies.MEASUREMENT)
    assert costs["step_seconds"] > 0
    assert costs["decoded_tokens_per_second"] > 0
    assert costs["peak_memory_bytes"] > 2**26
    assert costs["data_sha256"] == measuring.data_hash(cfg)
    other = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seed=1))
    assert measuring.data_hash(other) != costs["data_sha256"]
    assert not (tmp_path / "none").exists()


@pytest.fixture
def queue(datasets_dir, tmp_path, monkeypatch):
    """`queue(script)`: runs whose processes execute a script; `W` is the work folder."""

    def make(script):
        plan = planning.build_plan(
            studies.study(datasets_dir, matched={"examples": None}, seeds=1), tmp_path, False, {}
        )
        monkeypatch.setattr(
            running,
            "run_command",
            lambda *words: [sys.executable, "-c", f"import sys; W = {words[-1]!r}\n{script}"],
        )
        return Queue(plan.runs(), dict.fromkeys(plan.runs(), 1.0)), plan

    return make


SUCCEED = "open(W + '/eval.json', 'w').close()"


def test_a_failed_arm_stops_no_other_and_its_error_is_recorded(queue, capsys):
    work_queue, plan = queue(f"if 'linear' in W: sys.exit('error: the loss is nan.')\n{SUCCEED}")
    work_queue.work(jobs=1)
    assert [run.arm for run in work_queue.failed] == ["linear"]
    assert running.is_done(plan.runs()[1])
    output = capsys.readouterr().out
    assert "[1/2] examples/linear/seed_0  failed: exit code 1: error: the loss is nan." in output
    assert "[2/2] examples/shuffle/seed_0  done" in output
    assert record.read(plan.runs()[0].cfg.workdir)["error"] == "error: the loss is nan."


def test_a_failed_one_time_step_stops_no_other_run(datasets_dir, tmp_path, monkeypatch, capsys):
    """A measurement and a prerequisite fail: the runs that need the latter fail with the reason."""
    first, arms = (
        {"text": {"fusion.kind": "text_only"}},
        {"new": {}, "taught": {"decoder.checkpoint": "{text}"}},
    )
    settings = {
        "prerequisites": first,
        "arms": arms,
        "reference": "new",
        "matched": {"examples": None},
        "seeds": 1,
    }
    study = studies.study(datasets_dir, **settings)
    script = (
        f"import sys; W = sys.argv[-1]\nif '/first/' in W: sys.exit('error: no room.')\n{SUCCEED}"
    )
    monkeypatch.setattr(
        running, "run_command", lambda *words: [sys.executable, "-c", script, words[-1]]
    )
    monkeypatch.setattr(preparing, "sys", SimpleNamespace(executable="false"))
    monkeypatch.setattr(definition, "load", lambda file: study)
    assert cli.main(["run", "mine.py", "--folder", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "first/text/seed_0  failed: exit code 1: error: no room." in output
    assert "measuring new failed" in output and "measuring taught failed" in output
    plan = planning.build_plan(study, tmp_path, False, {})
    new, taught = plan.runs()
    assert running.is_done(new) and not running.is_done(taught)
    reason = results.read_results(plan).missing[taught.name]
    assert reason.startswith("failed: ") and "first/text/seed_0" in reason


def test_a_trained_run_answers_its_probes_next(queue, datasets_dir, tmp_path, monkeypatch):
    """One attempt each: the training, and the probe that fails once."""
    work_queue, plan = queue(SUCCEED)
    probes = {"text": {"fusion.kind": "text_only"}, "more": {"data.seed": 1}}
    study = dataclasses.replace(plan.study, probes=probes)
    plan = planning.build_plan(study, tmp_path, False, {})
    script = (
        "import os, sys; W = os.path.dirname(sys.argv[-1])\n"
        "if 'more' in W and not os.path.exists(W + '/t'): open(W + '/t', 'w'); sys.exit('error: x')"
        f"\n{SUCCEED}"
    )
    make_command = running.make_probe_command

    def fake(run, probe):
        return [sys.executable, "-c", script, make_command(run, probe)[-1]]

    monkeypatch.setattr(running, "make_probe_command", fake)
    run = plan.runs()[0]
    for failures in (1, 0):
        work_queue = Queue([run], {run: 1.0})
        work_queue.work(jobs=1)
        assert len(work_queue.failed) == failures
        assert running.is_done(run) == (not failures)
    codes = [attempt["exit_code"] for attempt in record.read(run.cfg.workdir)["attempts"]]
    assert codes == [0, 0, 1, 0]
    asked = files.from_json((run.probe_folder("text") / running.PROBE_CONFIG).read_text(), "it")
    assert asked.decoder.checkpoint == run.cfg.workdir and asked.fusion.kind == "text_only"


def test_every_attempt_is_recorded_with_the_commit_at_its_start(queue, monkeypatch):
    _, plan = queue(SUCCEED)
    for commit in ("one", "two"):
        monkeypatch.setattr(record, "environment", lambda commit=commit: {"commit": commit})
        process = running.Process(plan.runs()[0])
        monkeypatch.setattr(record, "environment", lambda: {"commit": "committed during the run"})
        process.wait_and_record()
    assert [
        attempt["commit"] for attempt in record.read(plan.runs()[0].cfg.workdir)["attempts"]
    ] == [
        "one",
        "two",
    ]


def test_a_run_with_a_damaged_record_fails_alone_and_keeps_it(queue, capsys):
    work_queue, plan = queue(SUCCEED)
    first, second = plan.runs()
    file = Path(first.cfg.workdir) / record.RECORD
    file.parent.mkdir(parents=True)
    file.write_text("[")
    work_queue.work(jobs=1)
    assert work_queue.failed == [first] and running.is_done(second)
    assert "run.json cannot be read" in capsys.readouterr().out
    assert file.read_text() == "["
    assert "run.json cannot be read" in results.read_results(plan).missing[first.name]


def test_a_run_finished_by_another_process_is_not_run_again(queue, capsys):
    work_queue, plan = queue("raise SystemExit('it ran')")
    for run in plan.runs():
        Path(run.cfg.workdir).mkdir(parents=True)
        Workdir(run.cfg.workdir).eval.write_text("{}")
    work_queue.work(jobs=1)
    assert not work_queue.failed and capsys.readouterr().out.count("is done") == 2


def test_a_preempted_run_is_continued(queue):
    work_queue, plan = queue(
        f"import os\nif not os.path.exists(W + '/t'): open(W + '/t', 'w'); sys.exit(75)\n{SUCCEED}"
    )
    work_queue.work(jobs=2)
    assert not work_queue.failed
    codes = [
        [attempt["exit_code"] for attempt in record.read(run.cfg.workdir)["attempts"]]
        for run in plan.runs()
    ]
    assert codes == [[75, 0], [75, 0]]


def test_the_report_calls_a_stopped_run_stopped(queue):
    _, plan = queue("print('error: stopped by SIGTERM.'); sys.exit(75)")
    run = plan.runs()[0]
    process = running.Process(run)
    while process.exit_code() is None:
        time.sleep(0.01)
    process.wait_and_record()
    assert results.read_results(plan).missing[run.name] == "stopped, to be continued"


def test_a_run_of_another_process_is_left_alone(queue, capsys):
    work_queue, plan = queue(SUCCEED)
    workdir = Workdir(plan.runs()[0].cfg.workdir)
    with workdir.locked():
        work_queue.work(jobs=1)
    assert [run.arm for run in work_queue.failed] == ["linear"]
    assert "is in use: another process trains there" in capsys.readouterr().out
    assert not workdir.config.exists()


def test_the_last_error_of_a_log(tmp_path):
    log = tmp_path / "log.txt"
    assert record.last_error(log) == ""
    log.write_text(
        "step 1\nTraceback\n  x\nValueError: no\n----\nFor simplicity, JAX has removed\n"
    )
    assert record.last_error(log) == "ValueError: no"
    log.write_text("step 1\nKilled\n\n")
    assert record.last_error(log) == "Killed"
