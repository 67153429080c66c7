"""Two or more sides of a benchmark that take turns.

Each side is a separate process, started and compiled first, and idle until its turn. Other work on
the machine then slows all sides alike, and a ratio is the median over the turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import report
from report import Result

# Sides of a comparison of one model.
SIDES = ("vlm_jax", "transformers")


class Server:
    """This script in another process with `--serve side ...`; `first` is its first answer."""

    def __init__(self, *arguments: str | Path, env: Mapping[str, str] | None = None):
        command = [sys.executable, sys.argv[0], *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # Default to the CPU: two processes cannot both hold a TPU.
        self._process = subprocess.Popen(
            command, env={"JAX_PLATFORMS": "cpu"} | os.environ | (env or {}), **pipes
        )
        self.first = self._answer()

    def _answer(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
            # Output before `serve`, such as the progress of preparing a dataset.
            print(line, end="", file=sys.stderr)
        raise SystemExit("the process of a side ended; its output is above")

    def ask(self, question) -> dict:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve(first: dict, answer: Callable[..., dict]) -> None:
    """Prints `first`, then the answer to every question; other output goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(first), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def parser(
    description: str, seconds: float, sides: Collection[str] = SIDES
) -> argparse.ArgumentParser:
    """Returns the parser of a benchmark of one model, and of the processes of its sides."""
    benchmark_parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    benchmark_parser.add_argument("--turns", type=int, default=7)
    benchmark_parser.add_argument(
        "--seconds", type=float, default=seconds, help="minimum of each turn"
    )
    report.add_option(benchmark_parser)
    benchmark_parser.add_argument("--serve", choices=sides, help=argparse.SUPPRESS)
    benchmark_parser.add_argument("--folder", help=argparse.SUPPRESS)
    return benchmark_parser


def with_one_model(
    model,
    options: argparse.Namespace,
    *arguments: str,
    peers: Mapping[str, Server] | None = None,
) -> tuple[list[dict], dict[str, list[dict]]]:
    """Returns first answers of vlm_jax and transformers, and the answers of all turn by turn.

    Both load the checkpoint that `model` is saved as. `peers` have started already, and take turns
    with them.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        servers = {side: Server("--serve", side, "--folder", folder, *arguments) for side in SIDES}
        first = [server.first for server in servers.values()]
        return first, take_turns(servers | (peers or {}), options.turns, options.seconds)


def take_turns(servers: Mapping[str, Server], turns: int, question) -> dict[str, list[dict]]:
    """Returns the answers of every side, turn by turn, and ends the processes."""
    try:
        answers = [
            {name: server.ask(question) for name, server in servers.items()} for _ in range(turns)
        ]
        return {name: [turn[name] for turn in answers] for name in servers}
    finally:
        for server in servers.values():
            server.close()


def times(work: Callable[[], object], seconds: float, at_least: int = 2) -> dict[str, float]:
    """Returns the median and the shortest time of the calls made within `seconds`.

    The first call is not counted: after the other side's turn, caches are cold.
    """
    work()
    first_start, calls = time.perf_counter(), []
    while len(calls) < at_least or time.perf_counter() - first_start < seconds:
        start = time.perf_counter()
        work()
        calls.append(time.perf_counter() - start)
    return {"seconds": statistics.median(calls), "best_seconds": min(calls)}


def middle(answers: list[dict], key: str) -> float:
    return statistics.median(answer[key] for answer in answers)


def best(answers: list[dict]) -> float:
    """Returns the fastest call of all turns, which other work on the machine disturbed least."""
    return min(answer["best_seconds"] for answer in answers)


def speed(
    name: str, ours: list[dict], theirs: list[dict], unit: str = "times transformers' speed"
) -> Result:
    """Returns their time over ours: above 1, ours is faster."""
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
    fastest = best(theirs) / best(ours)
    return Result.of(name, unit, ratios, fastest)


def peak_bytes(work: Callable[[], object]) -> int:
    """Returns the peak memory of the process while `work` runs (Linux)."""
    with open("/proc/self/clear_refs", "w") as file:
        # 5 resets the peak.
        file.write("5")
    work()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
