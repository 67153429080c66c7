"""One-time steps before the runs: take over prerequisites, measure costs."""

import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from vlm_jax.config import Experiment, UserError
from vlm_jax.config.files import to_json
from vlm_jax.runtime.preemption import RESUME_ME
from vlm_jax.runtime.workdir import Workdir, write_atomic
from vlm_jax.study.definition import Study
from vlm_jax.study.planning import Run, resolve_checkpoints
from vlm_jax.study.run import record, running
from vlm_jax.study.run.folder import Folder, as_json, diff


def reuse_finished(folder: Folder, prerequisites: Iterable[Run]) -> None:
    """Copies prerequisites that a study beside this one has finished with the same experiment."""
    for run in prerequisites:
        workdir = Path(run.cfg.workdir)
        if workdir.exists():
            continue
        for other in sorted(folder.path.parent.glob(f"*/{workdir.relative_to(folder.path)}")):
            if _is_finished_equal(other, run.cfg):
                staged = workdir.with_name(f"{workdir.name}.tmp")
                shutil.rmtree(staged, ignore_errors=True)
                shutil.copytree(other, staged)
                staged.rename(workdir)
                print(f"{run.name} is copied from {other}", flush=True)
                break


def _is_finished_equal(folder: Path, cfg: Experiment) -> bool:
    workdir = Workdir(str(folder))
    if not workdir.eval.exists():
        return False
    return not diff(as_json(workdir.read_config()), as_json(resolve_checkpoints(cfg)))


def measure_models(folder: Folder, models: Mapping[str, Experiment]) -> None:
    """Measures every model without a measurement, one at a time, each in its own process.

    A failure is printed, and the report goes without these costs.
    """
    folder.measured.mkdir(parents=True, exist_ok=True)
    for name, cfg in models.items():
        if folder.read_measurement(name) is not None:
            continue
        print(f"measuring {name}", flush=True)
        try:
            _measure_model(folder, name, cfg)
        except UserError as error:
            # Its prerequisite failed.
            print(f"measuring {name} failed: {error}", flush=True)


def _measure_model(folder: Folder, name: str, cfg: Experiment) -> None:
    config = folder.measured / f"{name}.config.json"
    workdir = str(folder.measured / name)
    write_atomic(config, to_json(replace(resolve_checkpoints(cfg), workdir=workdir)))
    module = "vlm_jax.study.run.measuring"
    command = [sys.executable, "-m", module, str(config), str(folder.measurement(name))]
    _run_to_end(command, folder.measured / f"{name}.log", f"measuring {name}")


def _run_to_end(command: list[str], log: Path, what: str) -> int:
    """Runs a process, resumes it while preempted, and prints its failure; returns its exit code."""
    while (code := running.call(command, log)) == RESUME_ME:
        pass
    if code:
        error = record.last_error(log)
        print(f"{what} failed with exit code {code}: {error} (log: {log})", flush=True)
    return code


def read_step_seconds(folder: Folder, study: Study) -> dict[str, float]:
    """Returns the measured seconds of a step of every arm that is measured."""
    step_seconds = {}
    for arm in study.arms:
        measurement = folder.read_measurement(arm)
        if measurement is not None:
            step_seconds[arm] = measurement["step_seconds"]
    return step_seconds
