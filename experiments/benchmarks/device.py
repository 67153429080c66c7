"""Checks and measures vlm_jax on one GPU or TPU chip, and writes a table. Nothing is installed.

    experiments/benchmarks/device.sh [--minutes 8] [--out DIR]

Checks: every attention path against the plain formula, generated tokens, an exact resume.
Measurements: training steps and generation of models of 0.4 B and 1 B parameters. DIR gets
`DEVICE.json` and `DEVICE.md`, rewritten after every row. The exit code is 1 if a check failed, 2
without an accelerator. Rows that do not fit into the minutes are listed as not run. `--tiny` runs
everything on tiny models, on a CPU too.

Every group of rows is a process of its own: a crash ends its group alone, and the peak memory of
a device, which JAX never resets, is that of one model.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from on_device import groups
from on_device.report import FAILURES, Report, Row

RESULTS = Path(__file__).parent / "results" / "device"
# For the first use of the device, which is not part of the minutes.
MAX_START_SECONDS = 120
# Lines of a process's errors that a row quotes.
QUOTED_LINES = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all rows together")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on any device")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.group:
        work(options.group, options.tiny, options.deadline)
        return 0
    deadline = time.time() + 60 * options.minutes
    (row,) = run_group(groups.DEVICE, options.tiny, time.time() + MAX_START_SECONDS)
    facts = row.values
    if row.status != "measured":
        print(f"the device cannot be used: {facts.get('error', row.status)}", file=sys.stderr)
        return 2
    if facts["platform"] == "cpu" and not options.tiny:
        print(
            "JAX has no accelerator here: install jax[cuda13] or jax[tpu], or use --tiny.",
            file=sys.stderr,
        )
        return 2
    report = Report(options.out, facts)
    for group in groups.names(options.tiny):
        run_group(group, options.tiny, deadline, report)
    report.write()
    print(f"\n{report.summary()}\n{report.path}.md", flush=True)
    return int(any(row.status in FAILURES for row in report.rows))


def run_group(
    group: str, is_tiny: bool, deadline: float, report: Report | None = None
) -> list[Row]:
    """Returns the rows of a group, computed in another process that is killed at the deadline."""
    seconds_left = deadline - time.time()
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        if report is not None:
            report.add(row)

    if seconds_left <= 0:
        add(Row(group, "all rows", "not run"))
        return rows
    command = [sys.executable, __file__, "--group", group, "--deadline", str(deadline)]
    command += ["--tiny"] * is_tiny
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    errors: list[str] = []
    reader = threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True)
    reader.start()
    killer = threading.Timer(seconds_left, process.kill)
    killer.start()
    expected = ["start"]
    for line in process.stdout:
        answer = json.loads(line)
        if "names" in answer:
            expected = answer["names"]
            continue
        row = Row(group, **answer)
        expected.remove(row.name)
        add(row)
    process.wait()
    killer.cancel()
    reader.join(timeout=5)
    # The row at which the process ended; all others after it were not begun.
    for number, name in enumerate(expected):
        if number or time.time() >= deadline:
            add(Row(group, name, "not run"))
            continue
        quoted = " | ".join("".join(errors).strip().splitlines()[-QUOTED_LINES:])
        message = f"the process ended with code {process.returncode}: {quoted}"
        add(Row(group, name, "error", {"error": message}))
    return rows


def work(group: str, is_tiny: bool, deadline: float) -> None:
    """Computes the rows of a group, and writes each to stdout as a line of JSON."""
    # Libraries, in C++ too, may print to stdout: give them stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(answer: dict) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    tasks = groups.tasks(group, is_tiny)
    send({"names": list(tasks)})
    for name, task in tasks.items():
        if time.time() > deadline:
            send({"name": name, "status": "not run"})
            continue
        start = time.perf_counter()
        status, values = groups.run_task(task)
        seconds = time.perf_counter() - start
        send({"name": name, "status": status, "values": values, "seconds": seconds})


if __name__ == "__main__":
    sys.exit(main())
