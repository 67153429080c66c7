"""Validation while training: when it is due, the history of its score, and when a run ends early.

The scores themselves are computed by a function (`ComputeScores`) of a later stage of the data
flow, `infer/validation.py`.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_jax.config import ConfigError, Experiment, NonFiniteError
from vlm_jax.runtime.workdir import Workdir, write_atomic
from vlm_jax.train.inputs import Inputs
from vlm_jax.train.log import Log

LOSS = "loss"  # the score that is better if it is lower; of a source: SPLIT/loss/NAME

# Parameters of the model -> scores by name, such as val/loss. Every process calls it, and gets the
# same scores.
ComputeScores = Callable[[Any], Mapping[str, float]]
# Builds and checks the function before the run writes anything.
PrepareScores = Callable[[Experiment, Inputs], ComputeScores]


@dataclass
class ScoreHistory:
    """The score that ranks checkpoints, by the step of its validation.

    It is saved with every checkpoint, so that a continued run knows its best step.
    """

    name: str  # such as val/loss
    scores: dict[int, float] = field(default_factory=dict)

    def rank(self, step: int) -> float | None:
        """Returns a number that is lower for a better score; None without a validation."""
        if step not in self.scores:
            return None
        is_loss = LOSS in self.name.split("/")[1:]
        return self.scores[step] if is_loss else -self.scores[step]

    @property
    def best_step(self) -> int | None:
        """The first step with the best score; None before the first validation."""
        return min(self.scores, key=self.rank, default=None)

    @property
    def validations_since_best(self) -> int:
        return sum(step > self.best_step for step in self.scores)


@dataclass
class Validation:
    """The validations of a run."""

    cfg: Experiment
    compute_scores: ComputeScores | None  # None: the run has no validation
    history: ScoreHistory
    log: Log | None = None  # None on every process but the first

    def is_due(self, step: int) -> bool:
        """Returns True every `eval.every_steps` and after the last step, once."""
        if self.compute_scores is None or step == 0 or step in self.history.scores:
            return False
        return step % self.cfg.eval.every_steps == 0 or step == self.cfg.train.steps

    def run(self, step: int, params) -> None:
        """Computes and logs the scores after a step.

        Raises:
          NonFiniteError: a score or a logit is not finite.
          ConfigError: the validation has no scored token for `train.best_metric`.
        """
        start = time.perf_counter()
        scores = self.compute_scores(params)
        seconds = time.perf_counter() - start
        for name, score in scores.items():
            if not math.isfinite(score):
                raise NonFiniteError(
                    f"step {step}: {name} is {score}, but the loss of the training is finite. "
                    "Earlier checkpoints are kept."
                )
        if self.history.name not in scores:
            raise ConfigError(
                f"train.best_metric {self.history.name!r}: no token of this source is scored in "
                f"the validation. Choose one of {', '.join(scores)}."
            )
        self.history.scores[step] = scores[self.history.name]
        if self.log is not None:
            self.log.validation(step, scores, seconds)
            if self.is_best(step):
                best = {"step": step, "metric": self.history.name, "scores": dict(scores)}
                write_atomic(Workdir(self.cfg.workdir).best, json.dumps(best, indent=2) + "\n")

    def is_best(self, step: int) -> bool:
        """Returns True for the step of the best validation so far."""
        return step == self.history.best_step

    @property
    def is_over(self) -> bool:
        """True if the run ends by `train.patience`."""
        patience = self.cfg.train.patience
        return patience is not None and self.history.validations_since_best >= patience

    def describe_end(self, step: int) -> str:
        """Returns a sentence about the best validation; "" without validation."""
        best = self.history.best_step
        if best is None:
            return ""
        name, patience = self.history.name, self.cfg.train.patience
        sentence = f"the best {name} is {self.history.scores[best]:.4f}, of step {best}."
        if not self.is_over:
            return sentence
        return (
            f"stopped after step {step} by train.patience {patience}: the last validations did not "
            f"improve {name}; {sentence}"
        )


def score_name(cfg: Experiment) -> str:
    """Returns the name of the score that ranks checkpoints; "" without validation."""
    if cfg.train.best_metric is not None:
        return cfg.train.best_metric
    first_split = next(iter(cfg.eval.named_splits), None)
    return "" if first_split is None else f"{first_split}/{LOSS}"
