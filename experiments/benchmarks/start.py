"""Seconds to the first step of a job: first start against a second with compiled programs.

    python experiments/benchmarks/start.py

Both start in a new work folder with prepared data. Each pair of starts has its own compilation
cache; the result is the median of the ratios, and the seconds of each part of both starts.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report
from report import Result

ROOT = Path(__file__).parents[2]
# Part of a start -> beginning of the line that the run prints at its end.
PARTS = {
    "imports, data and initial state": "compiling the training step",
    "compilation of the step": "compiled in",
    "first step": "step 1/",
}


def start_seconds(config: str, folder: Path, cache: Path) -> dict[str, float]:
    """Starts a run; returns the seconds of each of `PARTS`."""
    command = [
        sys.executable,
        "run.py",
        "--config",
        config,
        "--workdir",
        str(folder),
        "--train.steps",
        "2",
    ]
    command += ["--train.log-every-steps", "1", "--train.compilation-cache-dir", str(cache)]
    part_start, seconds = time.monotonic(), {}
    environment = {
        key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"
    }
    # Without a terminal, the run prints lines instead of a progress bar.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    output = ""
    for part, beginning in PARTS.items():
        for line in process.stdout:
            output += line
            if line.startswith(beginning):
                break
        else:
            raise SystemExit(f"the run ended before its first step:\n{output}")
        now = time.monotonic()
        seconds[part], part_start = now - part_start, now
    process.terminate()
    process.communicate()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/easy_vqa/unified.py")
    parser.add_argument("--pairs", type=int, default=5)
    report.add_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder, first_starts, second_starts = Path(folder), [], []
        start_seconds(options.config, folder / "prepared", folder / "unused")
        for pair in map(str, range(options.pairs)):
            cache = folder / pair / "cache"
            first_starts.append(start_seconds(options.config, folder / pair / "first", cache))
            second_starts.append(start_seconds(options.config, folder / pair / "second", cache))
    totals = [sum(parts.values()) for parts in first_starts]
    ratios = [sum(second.values()) / total for second, total in zip(second_starts, totals)]
    results = [
        Result.of("first start to the first step", "s", totals, min(totals)),
        Result.of("second start", "times the first", ratios),
    ]
    for name, starts in (("first start", first_starts), ("second start", second_starts)):
        results += [
            Result.of(f"{name}: {part}", "s", [parts[part] for parts in starts]) for part in PARTS
        ]
    report.write(results, options.json)


if __name__ == "__main__":
    main()
