"""Sides that take turns: each is a process of its own, started and compiled first, and rests until it is asked.

What a machine does beside a benchmark then slows all sides alike, and a ratio is the median over the turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

SIDES = ("vlm_jax", "transformers")  # of a comparison that holds one model


class Server:
    """This script in another process with the arguments `--serve side ...`; `first` is what it said when ready."""

    def __init__(self, *arguments: str, env: Mapping[str, str] | None = None):
        command = [sys.executable, sys.argv[0], *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # On the CPU, unless told otherwise: two processes that look for a TPU get in each other's way.
        self._process = subprocess.Popen(
            command, env={"JAX_PLATFORMS": "cpu"} | os.environ | (env or {}), **pipes
        )
        self.first = self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a side's process ended: what it said is above")
        return json.loads(line)

    def ask(self, question) -> dict:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve(first: dict, answer: Callable[..., dict]) -> None:
    """Says `first`, then the answer to every question; what else is printed goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(first), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def parser(description: str, seconds: float) -> argparse.ArgumentParser:
    """The options of a benchmark whose sides hold one model, and of the processes that serve them."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--turns", type=int, default=7)
    made.add_argument("--seconds", type=float, default=seconds, help="of every turn, at least")
    made.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    made.add_argument("--folder", help=argparse.SUPPRESS)
    return made


def with_one_model(
    model, given: argparse.Namespace, *arguments: str
) -> tuple[list[dict], dict[str, list[dict]]]:
    """What vlm_jax and transformers say first, and their answers, turn by turn; both load what `model` is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        servers = {side: Server("--serve", side, "--folder", folder, *arguments) for side in SIDES}
        first = [server.first for server in servers.values()]
        return first, take_turns(servers, given.turns, given.seconds)


def take_turns(servers: Mapping[str, Server], turns: int, question) -> dict[str, list[dict]]:
    """The answers of every side, turn by turn; then the processes end."""
    try:
        answers = [
            {name: server.ask(question) for name, server in servers.items()} for _ in range(turns)
        ]
        return {name: [turn[name] for turn in answers] for name in servers}
    finally:
        for server in servers.values():
            server.close()


def times(work: Callable[[], object], seconds: float, at_least: int = 2) -> dict[str, float]:
    """Seconds of the middle one and of the fastest of the calls that `seconds` have room for."""
    begun, calls = time.perf_counter(), []
    while len(calls) < at_least or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        work()
        calls.append(time.perf_counter() - start)
    return {"seconds": statistics.median(calls), "best_seconds": min(calls)}


def middle(answers: list[dict], key: str) -> float:
    return statistics.median(answer[key] for answer in answers)


def best(answers: list[dict]) -> float:
    """The fastest call of all turns: what other work on the machine disturbed least."""
    return min(answer["best_seconds"] for answer in answers)


def speed(ours: list[dict], theirs: list[dict]) -> str:
    """Their time over ours: the median over the turns, the range, and that of the fastest calls."""
    found = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
    fastest = best(theirs) / best(ours)
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}; of the fastest calls {fastest:.2f})"


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that the process holds while `work` runs (Linux)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    work()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
