"""Every benchmark runs with its fewest calls, agrees with what it compares, and prints a table."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "train_step": ["--turns", "1", "--seconds", "0"],
    "decode": ["--turns", "1", "--seconds", "0"],
    "questions": ["--turns", "1", "--seconds", "0"],
    "step": ["--turns", "1", "--seconds", "0"],
    "packing": ["--seconds", "0.5"],
    "packing_window": ["--conversations", "500"],
    "input_pipeline": ["--seconds", "0"],
    "loading": [],
    "start": ["--pairs", "1"],
}
# Modules of the others, and the script that runs them all.
PARTS = {"probe", "turns", "report", "all"}


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
