"""Seconds to the first step of a job: first start against a second with compiled programs.

    python experiments/benchmarks/start.py

Both start in a new work folder with prepared data. Each pair of starts has its own compilation
cache; the result is the median of the ratios.
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
    start = time.monotonic()
    environment = {
        key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"
    }
    # Without a terminal, the run prints lines instead of a progress bar.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("step 1/"):
            break
    else:
        raise SystemExit(f"the run ended before its first step:\n{output}")
    seconds = time.monotonic() - start
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
        folder, firsts, ratios = Path(folder), [], []
        seconds_to_first_step(options.config, folder / "prepared", folder / "unused")
        for pair in map(str, range(options.pairs)):
            cache = folder / pair / "cache"
            first = seconds_to_first_step(options.config, folder / pair / "first", cache)
            second = seconds_to_first_step(options.config, folder / pair / "second", cache)
            firsts.append(first)
            ratios.append(second / first)
            print(
                f"first step after {first:.1f} s, second start {second:.1f} s: {ratios[-1]:.2f}",
                flush=True,
            )
    results = [
        Result.of("first start to the first step", "s", firsts, min(firsts)),
        Result.of("second start", "times the first", ratios),
    ]
    report.write(results, options.json)


if __name__ == "__main__":
    main()
