"""Checkpoints: the state and the place in the data as one unit, through Orbax."""

import contextlib
import logging
from pathlib import Path
from typing import NamedTuple

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vlm_jax.config import ConfigError, RunError, Train, UserError
from vlm_jax.runtime import distributed
from vlm_jax.structs import State

LOSS_SUM = "loss_sum"  # key of a checkpoint's metrics


class SaveError(RunError):
    """A checkpoint could not be written."""


class LossSum(NamedTuple):
    """Sum of the training losses since the last logged step, saved so that a resumed run logs the same mean."""

    total: float = 0.0
    steps: int = 0


NO_LOSSES = LossSum()


class _Manager(ocp.CheckpointManager):
    def metrics(self, step: int) -> dict[str, float] | None:
        """None, too, where the file is damaged: that costs one checkpoint its rank, and not the run its start."""
        try:
            return super().metrics(step)
        except ValueError:
            return None


class Checkpoints:
    """Those of a run that `train.keep_checkpoints`, `keep_best` and `keep_every_steps` name.

    A step's folder gets its name when it is complete, never before, and others are removed only after that: a crash at
    any moment leaves the last whole one.
    """

    def __init__(self, path: Path, cfg: Train):
        for name in (
            "absl",
            "asyncio",
        ):  # what they say at length is raised too, and said here in a sentence
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._path = path
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_kept(cfg), best_fn=_loss, best_mode="min"
        )
        with self._writing():
            self._manager = _Manager(path.resolve(), options=options)
        self._damaged: set[int] = (
            set()
        )  # kept until one of the same step or of an earlier one is saved

    def save(
        self, step: int, state: State, data_state: dict, loss: float, loss_sum: LossSum = NO_LOSSES
    ) -> None:
        """Returns while the files are still being written; `close` waits for them. `loss` ranks them, the lowest first.

        Raises:
          SaveError: this one, or the one before, could not be written.
        """
        for damaged in [
            one for one in self._damaged if one >= step
        ]:  # Orbax saves nothing before its latest step
            self._manager.delete(damaged)
            self._damaged.remove(damaged)
        if step in self._manager.all_steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state)
        )
        metrics = {"loss": loss, LOSS_SUM: list(loss_sum)}
        with self._writing():
            if not self._manager.save(step, args=arguments, metrics=metrics):
                raise ValueError(f"Orbax wants none of step {step}")

    def restore(self, like: State, step: int | None = None) -> tuple[State, dict] | None:
        """The last whole checkpoint, laid out as `like` (shapes with shardings), or None where none was saved.

        One that cannot be read, by this process or by another, is named, and the one before it is taken.

        Args:
          step: of the only checkpoint to read; None: any.

        Raises:
          ConfigError: none of them can be read, in which case a new run would overwrite them; or `step` was not saved.
        """
        saved = sorted(self._manager.all_steps(), reverse=True)
        candidates = [one for one in saved if step in (None, one)]
        if saved and not candidates:
            raise ConfigError(
                f"{self._path} holds no checkpoint of step {step}: choose {', '.join(map(str, saved))}."
            )
        for candidate in candidates:
            arguments = ocp.args.Composite(
                state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
            )
            try:
                with distributed.raise_on_all():
                    restored = self._read(candidate, arguments)
            except UserError as error:
                if step is not None:
                    raise ConfigError(
                        f"checkpoint {step} in {self._path} is not whole ({error})."
                    ) from None
                print(
                    f"checkpoint {candidate} is not whole and is passed over ({error})", flush=True
                )
                self._damaged.add(candidate)
                continue
            return restored["state"], restored["data"]
        if self._damaged:
            raise ConfigError(
                f"no checkpoint in {self._path} is whole: move them away to begin anew."
            )
        return None

    def loss_sum(self, step: int) -> LossSum:
        """The losses up to a saved step that no row of the log has; none for step 0 and for older checkpoints."""
        metrics = (self._manager.metrics(step) if step else None) or {}
        return LossSum(*metrics.get(LOSS_SUM, ()))

    def _read(self, step: int, arguments: ocp.args.Composite):
        try:
            return self._manager.restore(step, args=arguments)
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise ConfigError(_first_line(error)) from error

    def close(self) -> None:
        """Waits for the last checkpoint. Raises SaveError where it could not be written."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()  # says what went wrong once more

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # whatever a full disk makes the writers raise
            raise SaveError(
                f"a checkpoint could not be written to {self._path} ({_first_line(error)}); {self.last_whole()}."
            ) from error

    def last_whole(self) -> str:
        """Says which there is to continue from."""
        steps = [int(path.name) for path in self._path.glob("*") if path.name.isdecimal()]
        return (
            f"the last whole checkpoint is that of step {max(steps)}"
            if steps
            else "there is no checkpoint"
        )


def _kept(cfg: Train):
    policies = [checkpoint_managers.LatestN(cfg.keep_checkpoints)]
    if cfg.keep_best:
        policies.append(
            checkpoint_managers.BestN(
                get_metric_fn=_loss,
                reverse=True,
                n=cfg.keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    if cfg.keep_every_steps:
        policies.append(checkpoint_managers.EveryNSteps(cfg.keep_every_steps))
    return checkpoint_managers.AnyPreservationPolicy(policies)


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
