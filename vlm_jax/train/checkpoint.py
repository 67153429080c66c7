"""Checkpoints: the state and the position in the data as one unit, written by Orbax."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vlm_jax.config import ConfigError, RunError, Train, UserError
from vlm_jax.runtime import distributed
from vlm_jax.structs import State

# Keys of a checkpoint's metrics.
LOSS_SUM = "loss_sum"
SCORES = "scores"
MIN_SLICE_BYTES = 2**20  # of an array that a replica writes


class SaveError(RunError):
    """A checkpoint could not be written."""


class LossSum(NamedTuple):
    """Sum of the training losses since the last logged row.

    Saved with a checkpoint, so that a resumed run logs the same mean.
    """

    total: float = 0.0
    steps: int = 0
    #: nats, scored tokens and tokens of each source of a mixture
    sources: Sequence[Sequence[float]] = ()

    def add(self, loss: float, sources: Sequence[Sequence[float]]) -> "LossSum":
        """Returns the sum with the loss of a further step, and with its sums of each source."""
        if self.sources:
            pairs = zip(self.sources, sources, strict=True)
            sources = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
        return LossSum(self.total + loss, self.steps + 1, sources)


NO_LOSSES = LossSum()
NO_SCORES: Mapping[int, float] = {}


@dataclass(frozen=True)
class _Best(checkpoint_managers.PreservationPolicy):
    """Preserves the checkpoints of lowest rank; of equal ones the earliest.

    Attributes:
      count: number of checkpoints.
      rank: returns the rank of a checkpoint, or None if it has none; it is not preserved then.
    """

    count: int
    rank: Callable[[checkpoint_managers.PolicyCheckpointInfo], float | None]

    def should_preserve(self, checkpoints, *, context) -> Sequence[bool]:
        del context
        ranks = {checkpoint.step: self.rank(checkpoint) for checkpoint in checkpoints}
        ranked = sorted(step for step, rank in ranks.items() if rank is not None)
        best = sorted(ranked, key=ranks.get)[: self.count]
        return [checkpoint.step in best for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
    def metrics(self, step: int) -> dict[str, float] | None:
        """Returns None for a damaged file, too: a checkpoint without its rank can be restored."""
        try:
            return super().metrics(step)
        except ValueError:
            return None


class Checkpoints:
    """The checkpoints of a run that `train.keep_checkpoints` and `keep_best` and so on retain.

    A step's folder gets its name when it is complete, and older ones are deleted only after that:
    whenever the process crashes, the last complete checkpoint remains.

    Args:
      rank: returns the rank of a step for `keep_best`, the lowest first, or None if it has none;
        None: the mean training loss is the rank.
    """

    def __init__(self, path: Path, cfg: Train, rank: Callable[[int], float | None] | None = None):
        # They log at length the errors that are raised, too, and reported here in a sentence.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # Orbax lets every replica write a slice of each array, and each slice is a program to
        # compile: hundreds at the first save, which takes longer than writing small arrays.
        array_handler = ocp.type_handlers.ArrayHandler(
            min_slice_bytes_for_replica_parallel=MIN_SLICE_BYTES
        )
        ocp.type_handlers.register_type_handler(jax.Array, array_handler, override=True)
        self._path = path
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_preservation_policy(cfg, rank), best_fn=_loss, best_mode="min"
        )
        with self._writing():
            self._manager = _Manager(path.resolve(), options=options)
        # Steps that could not be read. They are kept until that step, or an earlier one, is saved.
        self._damaged: set[int] = set()

    @property
    def last_step(self) -> int:
        """The last step that was saved; 0 if none was."""
        return max(self._manager.all_steps(), default=0)

    def save(
        self,
        step: int,
        state: State,
        data_state: dict,
        loss: float,
        loss_sum: LossSum = NO_LOSSES,
        scores: Mapping[int, float] = NO_SCORES,
    ) -> None:
        """Starts to write a checkpoint; `close` waits for the files.

        Args:
          loss: mean since the checkpoint before.
          scores: of all validations so far, by step.

        Raises:
          SaveError: this checkpoint, or the one before, could not be written.
        """
        # Orbax saves nothing before its latest step.
        for damaged in sorted(damaged for damaged in self._damaged if damaged >= step):
            self._manager.delete(damaged)
            self._damaged.remove(damaged)
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state)
        )
        metrics = {"loss": loss, LOSS_SUM: list(loss_sum), SCORES: list(scores.items())}
        with self._writing():
            if not self._manager.save(step, args=args, metrics=metrics):
                raise ValueError(f"Orbax did not save step {step}")

    def restore(self, like: State, step: int | None = None) -> tuple[State, dict] | None:
        """Returns (state, position in the data) of the last checkpoint; None if none was saved.

        A checkpoint that any process cannot read is reported, and the one before it is taken.

        Args:
          like: shapes and shardings of the state.
          step: of the only checkpoint to read; None: the last one.

        Raises:
          ConfigError: all checkpoints are damaged (a new run would overwrite them), or `step` was
            not saved.
        """
        saved = sorted(self._manager.all_steps(), reverse=True)
        if saved and step is not None and step not in saved:
            raise ConfigError(
                f"{self._path} has no checkpoint of step {step}: choose "
                f"{', '.join(map(str, saved))}."
            )
        for candidate in saved:
            if step not in (None, candidate):
                continue
            try:
                with distributed.raise_on_all():
                    return self._read(candidate, like)
            except UserError as error:
                if step is not None:
                    message = f"checkpoint {step} in {self._path} is damaged ({error})."
                    raise ConfigError(message) from None
                print(f"checkpoint {candidate} is damaged and is skipped ({error})", flush=True)
                self._damaged.add(candidate)
        if self._damaged:
            raise ConfigError(
                f"all checkpoints in {self._path} are damaged: move them away to start over."
            )
        return None

    def loss_sum(self, step: int) -> LossSum:
        """Returns the losses up to a saved step that no row of the log contains.

        None for step 0 and for checkpoints of older versions.
        """
        return LossSum(*self._metrics(step).get(LOSS_SUM, ()))

    def scores(self, step: int) -> dict[int, float]:
        """Returns the scores of the validations up to a saved step, by step."""
        return dict(self._metrics(step).get(SCORES, ()))

    def _metrics(self, step: int) -> dict:
        return (self._manager.metrics(step) if step else None) or {}

    def _read(self, step: int, like: State) -> tuple[State, dict]:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        # Damaged files raise any exception in the readers.
        except Exception as error:
            raise ConfigError(_first_line(error)) from error
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits for the last checkpoint. Raises SaveError if it could not be written."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()  # raises the same error again

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        # A full disk raises any exception in the writers.
        except Exception as error:
            raise SaveError(
                f"a checkpoint could not be written to {self._path} ({_first_line(error)}); "
                f"{self.last_whole()}."
            ) from error

    def last_whole(self) -> str:
        """Names the checkpoint from which the run can continue."""
        steps = [int(path.name) for path in self._path.glob("*") if path.name.isdecimal()]
        if not steps:
            return "no checkpoint was saved"
        return f"the last complete checkpoint is of step {max(steps)}"


def _preservation_policy(cfg: Train, rank: Callable[[int], float | None] | None):
    def rank_checkpoint(checkpoint) -> float | None:
        if rank is not None:
            return rank(checkpoint.step)
        return None if checkpoint.metrics is None else _loss(checkpoint.metrics)

    policies = [checkpoint_managers.LatestN(cfg.keep_checkpoints)]
    if cfg.keep_best:
        policies.append(_Best(cfg.keep_best, rank_checkpoint))
    if cfg.keep_every_steps is not None:
        policies.append(checkpoint_managers.EveryNSteps(cfg.keep_every_steps))
    return checkpoint_managers.AnyPreservationPolicy(policies)


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
