"""run.json: the attempts of a run, each with its commit, versions and machine."""

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

# Root of the repository.
ROOT = Path(__file__).parents[3]
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
# Files in the work folder of a run: its attempts, and their output.
RECORD = "run.json"
LOG = "log.txt"
# An error message is searched for in the last lines of a log.
ERROR_LINES = 40


def environment() -> dict:
    """Returns the commit, the files that differ from it, package versions and the processor."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def _git(*arguments: str) -> str:
    """Returns git's output for this repository; "" without git or without a history."""
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True
        )
    except OSError:
        return ""
    return "" if result.returncode else result.stdout.strip()


def processor() -> str:
    """Returns the model name of the CPU; its architecture where Linux does not know the name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def read(workdir: str) -> dict:
    """Returns `attempts`, each with its environment, and the last `error`; {} for a new run.

    Raises:
      ConfigError: the file is damaged.
    """
    file = Path(workdir) / RECORD
    return read_json(file) if file.exists() else {}


def read_json(file: Path) -> dict:
    """Returns the JSON object of a file; raises ConfigError if it has none."""
    value = parse_file(file, json.loads)
    if not isinstance(value, dict):
        raise ConfigError(f"{file} does not hold a JSON object.")
    return value


def parse_file(file: Path, parse: Callable[[str], Any]):
    """Returns `parse(text)`; raises ConfigError if that or reading the file fails."""
    try:
        return parse(file.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{file} cannot be read: {reason}.") from None


def add_attempt(
    workdir: str, command: list[str], seconds: float, exit_code: int, environment: dict
) -> dict:
    """Adds an attempt, made in `environment`, to a run's record, and returns the record."""
    attempt = {
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": seconds,
        "exit_code": exit_code,
        "command": command,
        **environment,
    }
    attempts = [*read(workdir).get("attempts", []), attempt]
    error = "" if exit_code in (0, RESUME_ME) else last_error(Path(workdir) / LOG)
    return _write(workdir, {"attempts": attempts, "error": error})


def add_error(workdir: str, error: str) -> None:
    """Records that a run could not start."""
    Path(workdir).mkdir(parents=True, exist_ok=True)
    _write(workdir, {"attempts": read(workdir).get("attempts", []), "error": error})


def _write(workdir: str, record: dict) -> dict:
    write_atomic(Path(workdir) / RECORD, json.dumps(record, indent=1) + "\n")
    return record


def last_error(log: Path) -> str:
    """Returns the last `error: ...` or `SomeError: ...` line of a log, else its last line."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pattern = re.compile(r"error:|[\w.]*(Error|Exception|Interrupt)\b")
    errors = [line for line in lines[-ERROR_LINES:] if pattern.match(line)]
    return (errors or lines or [""])[-1]
