"""What is done once, before the runs: what arms build on is trained, and what every model costs is measured."""

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vlm_jax.config import Experiment, UserError
from vlm_jax.config.files import to_json
from vlm_jax.runtime.preemption import RESUME_ME
from vlm_jax.runtime.workdir import Workdir, write_atomic
from vlm_jax.study.definition import Study
from vlm_jax.study.planning import resolved
from vlm_jax.study.run import record, running
from vlm_jax.study.run.folder import Folder


def train_first(name: str, cfg: Experiment, exported: Path) -> None:
    """Trains a run that arms build on and writes it as a checkpoint folder, unless that is there.

    Where that fails it says so, and so will the runs that need it; the others do without.

    Raises:
      ConfigError: its work folder cannot be written or holds another run.
    """
    if (exported / "config.json").exists():
        return
    Workdir(cfg.workdir).open(cfg)
    log = Path(cfg.workdir) / record.LOG
    print(f"training {name}, which arms build on", flush=True)
    for arguments in (
        ("train", "--workdir", cfg.workdir),
        ("export", "--checkpoint", cfg.workdir, "--output", exported),
    ):
        command, began, environment = (
            running.command(*map(str, arguments)),
            time.monotonic(),
            record.environment(),
        )
        code = _exit_code(command, log, f"first {name}")
        record.add(cfg.workdir, command, time.monotonic() - began, code, environment)
        if code:
            return


def measure(place: Folder, models: Mapping[str, Experiment]) -> None:
    """Measures every model that was not measured yet, one after the other; each is a few steps in its own process.

    One that cannot be measured is named, and its costs are left out.
    """
    place.measured.mkdir(parents=True, exist_ok=True)
    for name, cfg in models.items():
        if place.read_measurement(name) is None:
            print(f"measuring {name}", flush=True)
            try:
                _measure(place, name, cfg)
            except UserError as error:  # what it builds on is not there
                print(f"measuring {name} failed: {error}", flush=True)


def _measure(place: Folder, name: str, cfg: Experiment) -> None:
    config, out = place.measured / f"{name}.config.json", place.measurement(name)
    write_atomic(config, to_json(replace(resolved(cfg), workdir=str(place.measured / name))))
    arguments = [sys.executable, "-m", "vlm_jax.study.run.measuring", str(config), str(out)]
    _exit_code(arguments, place.measured / f"{name}.log", f"measuring {name}")


def _exit_code(arguments: list[str], log: Path, what: str) -> int:
    """Runs a process to its end; says so where it failed."""
    while (code := running.call(arguments, log)) == RESUME_ME:
        pass
    if code:
        print(
            f"{what} failed with exit code {code}: {record.last_error(log)} (all it said: {log})",
            flush=True,
        )
    return code


def step_seconds(place: Folder, study: Study) -> dict[str, float]:
    """Arm -> measured seconds of a step of its own model, of those that were measured."""
    found = {arm: place.read_measurement(arm) for arm in study.arms}
    return {arm: values["step_seconds"] for arm, values in found.items() if values}
