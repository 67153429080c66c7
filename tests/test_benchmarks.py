"""Every benchmark runs with its fewest calls, agrees with what it compares, and prints a table."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "train_step": ["--turns", "1", "--seconds", "0"],
    "lora": ["--turns", "1", "--seconds", "0"],
    "decode": ["--turns", "1", "--seconds", "0"],
    "questions": ["--turns", "1", "--seconds", "0"],
    "step": ["--turns", "1", "--seconds", "0"],
    "packing": ["--seconds", "0.5"],
    "native": ["--seconds", "0"],
    "packing_window": ["--conversations", "500"],
    "input_pipeline": ["--seconds", "0"],
    "loading": [],
    "serve": ["--turns", "1", "--seconds", "0"],
    "start": ["--pairs", "1"],
    "metrics": ["--answers", "100"],
}
# Modules of the others, the script that runs them all, the one for accelerators, and the one that
# needs a checkout and an environment of MaxText.
PARTS = {"probe", "turns", "report", "big_vision_step", "all", "device", "maxtext"}


def test_all_benchmarks_are_here():
    assert {
        path.stem for path in (ROOT / "experiments" / "benchmarks").glob("*.py")
    } == SCRIPTS.keys() | PARTS


def load_script(monkeypatch, name: str):
    folder = ROOT / "experiments" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_document_has_every_result(monkeypatch):
    everything = load_script(monkeypatch, "all")
    document = everything.DOCUMENT.read_text()
    assert everything.with_table(document, everything.table(everything.load())) == document


def test_a_figure_that_one_processor_lacks_is_not_measured(monkeypatch):
    everything = load_script(monkeypatch, "all")
    machine = {"processor": "A", "model": "x 6 1", "cores": 2, "instruction_sets": ["avx2"]}
    figure = {"name": "step", "unit": "s", "median": 2, "lowest": 1, "highest": 3, "fastest": None}
    first = {"machine": machine, "date": "2026-01-01", "results": {"train_step": [figure]}}
    second = first | {"results": {"train_step": [figure | {"name": "memory"}]}}
    rows = everything.table([first, second]).splitlines()[2:]
    assert rows == [
        "| step, s | 2.00 (1.00 to 3.00) | not measured | `train_step.py` |",
        "| memory, s | not measured | 2.00 (1.00 to 3.00) | `train_step.py` |",
    ]


def test_big_vision_is_a_checkout(monkeypatch, tmp_path):
    script = load_script(monkeypatch, "train_step")
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--big_vision", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"not a checkout of \S+/big_vision: it has no \S+\.py\.$"):
        script.main()


def test_the_fastest_form_of_big_vision_takes_turns(monkeypatch):
    script = load_script(monkeypatch, "train_step")
    seconds = {"unrolled": 3.0, "scanned": 2.0, "scanned_dots": 4.0}
    closed = []

    class Server:
        def __init__(self, *arguments):
            self.layers = arguments[-1]
            self.first = {"best_seconds": seconds[self.layers]}

        def close(self):
            closed.append(self.layers)

    monkeypatch.setattr(script.turns, "Server", Server)
    assert script.big_vision_step.fastest_server("checkout").layers == "scanned"
    assert closed == ["unrolled", "scanned_dots"]


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        ({"losses": [9.0, 9.0], "parameters": 100}, "does not fall"),
        ({"losses": [9.0, 8.0], "parameters": 97}, "97 parameters"),
    ],
)
def test_a_peer_learns_and_is_as_large(monkeypatch, peer, message):
    script = load_script(monkeypatch, "train_step")
    script.check_peer({"parameters": 100}, "peer", {"losses": [9.0, 8.0], "parameters": 99})
    with pytest.raises(SystemExit, match=message):
        script.check_peer({"parameters": 100}, "peer", peer)


def test_the_script_for_accelerators_runs_on_a_cpu(tmp_path):
    command = ["experiments/benchmarks/device.sh", "--tiny", "--out", tmp_path]
    settings = {
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"passed", "measured"}
    groups = {row["group"].partition(":")[0] for row in rows}
    assert groups == {"Attention", "Tokens", "Resume", "Training step", "Generation"}
    table = (tmp_path / "cpu.md").read_text()
    assert all(f"{row['name']} | {row['status']} |" in table for row in rows)


def test_a_wrong_or_broken_check_is_a_row(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "benchmarks"))
    from on_device import groups, report

    def break_down():
        raise RuntimeError("no kernel")

    rows = [
        report.Row("Attention", name, *groups.run_task(task))
        for name, task in {"wrong": lambda: {"passed": False}, "broken": break_down}.items()
    ]
    assert [row.status for row in rows] == ["failed", "error"]
    assert "RuntimeError: no kernel" in rows[1].values["error"]


def test_rows_without_time_are_listed_as_not_run(monkeypatch):
    script = load_script(monkeypatch, "device")
    rows = script.run_group("Attention", is_tiny=True, deadline=0)
    assert [row.status for row in rows] == ["not run"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs(name):
    command = [sys.executable, f"experiments/benchmarks/{name}.py", *SCRIPTS[name]]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\d\.\d", done.stdout), done.stdout
