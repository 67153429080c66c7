"""Trackers: services that show the metrics of runs, one row each in `TRACKERS`.

A tracker that fails is left out of the rest of the run: metrics.jsonl has every row in any case.
"""

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.config.hints import nearest
from vlm_jax.config.validate import flat
from vlm_jax.runtime.packages import check_installed
from vlm_jax.runtime.workdir import Workdir, write_atomic

EXTRA = "requirements-trackers.txt"
PROJECT = "vlm_jax"  # the project, or experiment, of all runs


@dataclass(frozen=True)
class TrackedRun:
    """A run as a service gets it."""

    name: str
    id: str | None  # of the run that is continued; None: a new one
    folder: str
    config: Mapping[str, object]  # "section.field" -> value


class Service(Protocol):
    """A run in a service; its class takes a `TrackedRun`, and imports the package."""

    id: str  # with which a later process continues the run

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _LoggedRun:
    """A run with the methods of wandb's, which trackio has as well."""

    _run: Any

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Wandb(_LoggedRun):
    """Weights & Biases. WANDB_MODE=offline writes to the work folder."""

    def __init__(self, run: TrackedRun):
        import wandb

        self.id = run.id or new_id()
        self._run = wandb.init(
            project=PROJECT,
            name=run.name,
            id=self.id,
            resume="allow",
            dir=run.folder,
            config=dict(run.config),
        )


class Mlflow:
    """MLflow. MLFLOW_TRACKING_URI names the server, or a local file or folder."""

    def __init__(self, run: TrackedRun):
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(PROJECT)
        self.id = mlflow.start_run(run_id=run.id, run_name=run.name).info.run_id
        # Parameters of a run are final, but a continued run may have other fields of the machine.
        if run.id is None:
            mlflow.log_params(dict(run.config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Trackio(_LoggedRun):
    """Trackio, which is local unless a Space is named. TRACKIO_DIR is its folder."""

    def __init__(self, run: TrackedRun):
        import trackio

        # Trackio continues a run by its name.
        self.id = run.id or f"{run.name}-{new_id()}"
        self._run = trackio.init(
            project=PROJECT, name=self.id, resume="allow", config=dict(run.config)
        )


# The name of a row is that of the package.
TRACKERS: dict[str, Callable[[TrackedRun], Service]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


class Tracker:
    """A service whose first failure is printed and ends its use."""

    def __init__(self, name: str, run: TrackedRun):
        self._name = name
        self._service: Service | None = None
        self._try(self._start, run)

    @property
    def id(self) -> str | None:
        """Id of the run in the service; None if it failed."""
        return None if self._service is None else self._service.id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values by their tags, such as train/loss and val/loss."""
        if self._service is not None:
            self._try(self._service.write, step, values)

    def close(self) -> None:
        if self._service is not None:
            self._try(self._service.close)

    def _start(self, run: TrackedRun) -> None:
        self._service = TRACKERS[self._name](run)

    def _try(self, function: Callable, *arguments) -> None:
        try:
            function(*arguments)
        # A service raises any exception, for instance without a network.
        except Exception as error:
            self._service = None
            print(
                f"train.trackers {self._name} failed and is left out ({error}); metrics.jsonl has "
                "every row.",
                flush=True,
            )


def check_trackers(names: Iterable[str]) -> None:
    """Checks `train.trackers`.

    Raises:
      ConfigError: a name has no row in TRACKERS, or its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(
                f"train.trackers {name!r} is not a tracker{nearest(name, TRACKERS)}: choose from "
                f"{', '.join(TRACKERS)}."
            )
        check_installed(name, f"train.trackers {name}", EXTRA)


def start_trackers(cfg: Experiment, workdir: Workdir) -> list[Tracker]:
    """Starts the trackers of a run, or continues its runs in their services."""
    ids = _read_ids(workdir.trackers)
    trackers = []
    for name in cfg.train.trackers:
        run = TrackedRun(workdir.path.name, ids.get(name), str(workdir.path), flat(cfg))
        tracker = Tracker(name, run)
        if tracker.id is not None:
            ids[name] = tracker.id
        trackers.append(tracker)
    if trackers:
        write_atomic(workdir.trackers, json.dumps(ids, indent=2) + "\n")
    return trackers


def _read_ids(file: Path) -> dict[str, str]:
    """Returns the id of the run in each service; without a readable file, the run is new there."""
    try:
        ids = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return ids if isinstance(ids, dict) else {}


def new_id() -> str:
    return uuid.uuid4().hex[:8]
