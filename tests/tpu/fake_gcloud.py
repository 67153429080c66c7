"""A `gcloud` for tests that simulates one TPU slice of two machines.

It refuses flags that the real one (528.0.0) lacks. Its state is in the folder $CLOUD:
  calls     every call of the user, as a JSON list of words
  request   state of the queued resource; no file without a request
  ahead     next states of the request, one for each poll
  node      state of the machines; no file while READY
  error     message with which every call fails
  outage    number of calls that fail from now on
  machines  home folders, empty after every creation
  buckets   contents of gs://

Modules that few commands need are imported there: imports take most of the time of a call.
"""

import json
import os
import sys
from pathlib import Path

CLOUD = Path(os.environ["CLOUD"])
EVERYWHERE = {"--project", "--zone", "--quiet", "--format"}
FLAGS = {  # of `gcloud compute tpus` and `gcloud storage`
    "queued-resources create": {
        *(
            "--node-id",
            "--accelerator-type",
            "--runtime-version",
            "--scopes",
            "--service-account",
            "--spot",
            "--reserved",
        )
    },
    "queued-resources describe": set(),
    "queued-resources delete": {"--force"},
    "tpu-vm describe": set(),
    "tpu-vm ssh": {"--worker", "--command"},
    "storage cp": set(),
    "storage objects": set(),
    "storage rm": set(),
}


def main(words: list[str]) -> int:
    if Path.home().parent != CLOUD / "machines":
        with open(CLOUD / "calls", "a") as calls:
            calls.write(json.dumps(["gcloud", *words]) + "\n")
    if (CLOUD / "error").exists():
        return refuse((CLOUD / "error").read_text())
    if outage():
        return refuse("Could not reach metadata service")
    command = " ".join(words[2:4] if words[0] == "compute" else words[:2])
    flags = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
    unknown = set(flags) - FLAGS[command] - EVERYWHERE
    if unknown:
        return refuse(f"unrecognized arguments: {unknown}")
    names = [word for word in words if not word.startswith("--")]
    return {
        "queued-resources create": create,
        "queued-resources describe": describe,
        "queued-resources delete": delete,
        "tpu-vm describe": describe_node,
        "tpu-vm ssh": lambda: ssh(flags["--worker"], flags["--command"]),
        "storage cp": lambda: copy(*names[2:]),
        "storage rm": lambda: in_bucket(names[-1]).unlink() or 0,
        "storage objects": lambda: (
            0 if in_bucket(names[-1]).exists() else refuse(f"{names[-1]} not found: 404.")
        ),
    }[command]()


def refuse(error: str) -> int:
    print(f"ERROR: (gcloud) {error}", file=sys.stderr)
    return 1


def outage() -> bool:
    file = CLOUD / "outage"
    left = int(file.read_text()) if file.exists() else 0
    if left:
        file.write_text(str(left - 1))
    return left > 0


def create() -> int:
    import shutil

    if (CLOUD / "request").exists():
        return refuse("ALREADY_EXISTS: the resource exists")
    (CLOUD / "request").write_text("CREATING")
    for worker in "01":
        shutil.rmtree(CLOUD / "machines" / worker, ignore_errors=True)
        (CLOUD / "machines" / worker).mkdir(parents=True)
    return 0


def describe() -> int:
    request, ahead = CLOUD / "request", CLOUD / "ahead"
    try:
        now = request.read_text()  # once: another call may delete it at any moment
    except FileNotFoundError:
        return refuse("NOT_FOUND: Resource 'queuedResources/x' was not found")
    states = ahead.read_text().split()
    if states or now == "CREATING":
        now = states.pop(0) if states else "ACTIVE"
        ahead.write_text(" ".join(states))
        request.write_text(now)
    print(now)
    return 0


def describe_node() -> int:
    node = CLOUD / "node"
    print(node.read_text() if node.exists() else "READY")
    return 0


def delete() -> int:
    import contextlib
    import signal

    if not (CLOUD / "request").exists():
        return refuse("NOT_FOUND: Resource 'queuedResources/x' was not found")
    for group in (CLOUD / "machines").glob("*/job/group"):
        with contextlib.suppress(ProcessLookupError):  # it ended before
            os.killpg(int(group.read_text()), signal.SIGKILL)
    (CLOUD / "request").unlink()
    (CLOUD / "node").unlink(missing_ok=True)
    return 0


def ssh(worker: str, command: str) -> int:
    import subprocess

    if (CLOUD / "request").read_text() != "ACTIVE" or (CLOUD / "node").exists():
        return refuse("the machines do not answer")
    codes = []
    for one in "01" if worker == "all" else worker:
        home = CLOUD / "machines" / one
        codes.append(
            subprocess.run(
                ["bash", "-c", command], cwd=home, env={**os.environ, "HOME": str(home)}
            ).returncode
        )
    return max(codes)


def in_bucket(url: str) -> Path:
    return CLOUD / "buckets" / url.removeprefix("gs://")


def copy(source: str, target: str) -> int:
    import shutil

    source, target = (
        in_bucket(name) if name.startswith("gs://") else Path(name) for name in (source, target)
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
