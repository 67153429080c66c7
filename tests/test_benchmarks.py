"""Every benchmark runs with its fewest calls, agrees with what it compares, and prints a table."""

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
PARTS = {"probe", "turns"}  # of the others


def test_all_benchmarks_are_here():
    assert {
        path.stem for path in (ROOT / "experiments" / "benchmarks").glob("*.py")
    } == SCRIPTS.keys() | PARTS


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
