"""What the second start of the same job saves, whose programs were compiled and kept by the first.

    python experiments/benchmarks/start.py

Both start in a fresh work folder, and the data is prepared before. The time is that from the start of the program to
its first step; pairs of starts, each with a cache of its own, and the median of their ratios.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def seconds_to_first_step(config: str, folder: Path, cache: Path) -> float:
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
    begun = time.monotonic()
    environment = {
        key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"
    }
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }  # in a terminal it draws a bar
    process, said = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes), ""
    for line in process.stdout:
        said += line
        if line.startswith("step 1/"):
            break
    else:
        raise SystemExit(f"the run ended before its first step:\n{said}")
    seconds = time.monotonic() - begun
    process.terminate()  # what comes after is not measured
    process.communicate()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/easy_vqa/unified.py")
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder, ratios = Path(folder), []
        seconds_to_first_step(given.config, folder / "prepared", folder / "unused")
        for pair in map(str, range(given.pairs)):
            runs = (folder / pair / name for name in ("first", "second"))
            first, second = (
                seconds_to_first_step(given.config, run, folder / pair / "cache") for run in runs
            )
            ratios.append(second / first)
            print(
                f"first start {first:.1f} s, second {second:.1f} s to the first step: {ratios[-1]:.2f}",
                flush=True,
            )
    print(f"median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
