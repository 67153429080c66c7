"""An `xpk` for tests that refuses flags the real one (1.16.0) lacks.

Jobs and storages are lines of files.
"""

import json
import os
import sys
from pathlib import Path

CLOUD = Path(os.environ["CLOUD"])
EVERYWHERE = {"--cluster", "--project", "--zone", "--quiet"}
FLAGS = {
    "cluster create": {
        "--tpu-type",
        "--num-slices",
        "--spot",
        "--on-demand",
        "--enable-gcsfuse-csi-driver",
    },
    "cluster delete": {"--force"},
    "storage list": set(),
    "storage attach": {
        *(
            "--type",
            "--mount-point",
            "--readonly",
            "--auto-mount",
            "--size",
            "--no-prefetch-metadata",
            "--mount-options",
        )
    },
    "workload list": {"--filter-by-status", "--filter-by-job"},
    "workload create": {
        *(
            "--workload",
            "--tpu-type",
            "--num-slices",
            "--base-docker-image",
            "--script-dir",
            "--max-restarts",
        ),
        *("--restart-on-exit-codes", "--termination-grace-period-seconds", "--command"),
    },
    "workload delete": {"--workload"},
}


def main(words: list[str]) -> int:
    with open(CLOUD / "calls", "a") as calls:
        calls.write(json.dumps(["xpk", *words]) + "\n")
    command = " ".join(words[:2])
    flags = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
    unknown = set(flags) - FLAGS[command] - EVERYWHERE
    if unknown:
        print(f"xpk: error: unrecognized arguments: {unknown}", file=sys.stderr)
        return 2
    jobs, storages = CLOUD / "jobs", CLOUD / "storages"
    if command == "workload create":
        assert (Path(flags["--script-dir"]) / "run.py").is_file()
        jobs.write_text(f"{flags['--workload']}   2026-01-01   medium   4   4   Admitted\n")
    elif command == "workload delete":
        jobs.unlink()
    elif command == "workload list":
        print("[XPK] Workload List Output:\nJobset Name   Created Time   Priority   TPU VMs Needed")
        if jobs.exists() and flags.get("--filter-by-status") != "QUEUED":
            print(jobs.read_text(), end="")
    elif command == "storage attach":
        storages.write_text(words[2] + "\n")
    elif command == "storage list":
        print(storages.read_text() if storages.exists() else "NAME  TYPE")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
