"""What the second start of the same job saves, whose programs were compiled and kept by the first.

    python experiments/benchmarks/start.py

Both start in a fresh work folder, and the data is prepared before. The time is that from the start of the program to
its first step.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def seconds_to_first_step(config: str, folder: Path, cache: Path) -> float:
    command = [sys.executable, "run.py", "--config", config, "--workdir", str(folder), "--train.steps", "2"]
    command += ["--train.log-every-steps", "1", "--train.compilation-cache-dir", str(cache)]
    begun = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    else:
        raise SystemExit("the run ended before its first step")
    seconds = time.monotonic() - begun
    process.terminate()  # what comes after is not measured
    process.communicate()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/easy_vqa_unified.py")
    config = parser.parse_args().config
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        seconds_to_first_step(config, folder / "prepared", folder / "unused")
        first, second = (seconds_to_first_step(config, folder / name, folder / "cache") for name in ("first", "second"))
    print(f"first start {first:.1f} s, second {second:.1f} s to the first step: {second / first:.2f}")


if __name__ == "__main__":
    main()
