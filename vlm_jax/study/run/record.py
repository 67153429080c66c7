"""With what a run was made: kept beside its results."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_jax.config import ConfigError
from vlm_jax.runtime.preemption import RESUME_ME
from vlm_jax.runtime.workdir import write_atomic

ROOT = Path(__file__).parents[3]  # of the repository
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "grain",
    "tensorflow-datasets",
    "tokenizers",
    "scipy",
)
RECORD, LOG = "run.json", "log.txt"  # in a work folder: its attempts, and all that they printed


def environment() -> dict:
    """The commit and whether files differ from it, versions, and the processor."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def _git(*arguments: str) -> str:
    """What git says about this program; nothing where it was installed without its history."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if not done.returncode else ""


def processor() -> str:
    """The name of the CPU, where the system says it (Linux)."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def read(workdir: str) -> dict:
    """What is known of a run: its `attempts`, each with its `environment`, and the last `error`; {} where nothing is.

    Raises:
      ConfigError: the file is damaged.
    """
    file = Path(workdir) / RECORD
    return read_json(file) if file.exists() else {}


def read_json(file: Path) -> dict:
    """Raises ConfigError where the file is not there or holds no JSON object."""
    found = parsed(file, json.loads)
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds no JSON object.")
    return found


def parsed(file: Path, parse: Callable[[str], Any]):
    """What `parse` makes of a file; ConfigError where that is not there or damaged (a ValueError of `parse`)."""
    try:
        return parse(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from None


def add(
    workdir: str, command: list[str], seconds: float, exit_code: int, environment: dict
) -> dict:
    """Writes down that a run was tried once more, in the `environment` of then; returns all that is known of it."""
    attempt = {
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": seconds,
        "exit_code": exit_code,
    }
    attempts = [*read(workdir).get("attempts", []), attempt | {"command": command} | environment]
    error = "" if exit_code in (0, RESUME_ME) else last_error(Path(workdir) / LOG)
    return _write(workdir, {"attempts": attempts, "error": error})


def refuse(workdir: str, error: str) -> None:
    """Writes down that a run could not begin."""
    Path(workdir).mkdir(parents=True, exist_ok=True)
    _write(workdir, {"attempts": read(workdir).get("attempts", []), "error": error})


def _write(workdir: str, record: dict) -> dict:
    write_atomic(Path(workdir) / RECORD, json.dumps(record, indent=1) + "\n")
    return record


def last_error(log: Path) -> str:
    """The line that says why a process ended: its last `error: ...` or `SomeError: ...`, or the last of all."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines()]
        if log.exists()
        else []
    )
    lines = [line for line in lines if line]
    named = [
        line
        for line in lines[-40:]
        if re.match(r"error:|[\w.]*(Error|Exception|Interrupt)\b", line)
    ]
    return (named or lines or [""])[-1]
