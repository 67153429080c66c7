"""The Python of a fake machine: a training that ends as the test chooses.

$CLOUD/outcomes has one word for every start: an exit code; `gone`, the TPU is preempted; or `long`,
which ends with 75 on SIGTERM. Every start is noted in $CLOUD/starts with its machine and its
arguments.
"""

import os
import signal
import sys
import time
from pathlib import Path

CLOUD, MACHINE = Path(os.environ["CLOUD"]), Path.home().name


def main() -> int:
    assert sys.argv[1] == "run.py" and Path("run.py").is_file()
    starts = CLOUD / "starts"
    started = (
        sum(line.startswith(MACHINE) for line in starts.read_text().splitlines())
        if starts.exists()
        else 0
    )
    with open(starts, "a") as file:
        file.write(" ".join([MACHINE, os.environ["JAX_PLATFORMS"], *sys.argv[2:]]) + "\n")
    outcome = (CLOUD / "outcomes").read_text().split()[started]
    if outcome.isdecimal():
        print("error: this is why" if outcome != "0" else "all is well")
        return int(outcome)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    if outcome == "gone":
        (CLOUD / "request").write_text("SUSPENDED")
    print("step 1", flush=True)
    time.sleep(600)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
