"""Axes on which arms are made equal to the reference, and the search for the field that does it.

The value of an axis must grow with the field. The search doubles or halves the field, then bisects
over the integers, among the experiments that are valid.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax

from vlm_jax.config import ConfigError, Experiment, UserError
from vlm_jax.config.validate import flat, validate
from vlm_jax.cost.flops import token_flow, train_flops
from vlm_jax.nn.models import abstract_params
from vlm_jax.study.changes import override

# Upper limit of the search.
MAX_VALUE = 1 << 30

AxisValue = Callable[[Experiment], float]


def parameters(cfg: Experiment) -> int:
    """Number of parameters of the model, frozen ones included."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(_model_only(cfg))))


def _model_only(cfg: Experiment) -> Experiment:
    """Returns the experiment with defaults in all sections that parameters do not depend on.

    So a search, which changes those, traces a model once (`abstract_params` is cached).
    """
    default = Experiment()
    return replace(
        cfg, train=default.train, optim=default.optim, eval=default.eval, seed=0, workdir=""
    )


def training_flops(cfg: Experiment) -> float:
    """FLOPs of the whole training (`vlm_jax.cost.flops`), without prerequisites."""
    return cfg.train.steps * flops_per_step(cfg)


def flops_per_step(cfg: Experiment) -> float:
    """FLOPs of one training step."""
    return _flops_per_step(replace(cfg, train=replace(cfg.train, steps=1), seed=0, workdir=""))


_flops_per_step = functools.cache(train_flops)


def examples(cfg: Experiment) -> int:
    """Training rows seen, repeated ones included: images with their questions, or packed rows."""
    return cfg.train.steps * cfg.train.batch_size


def image_tokens(cfg: Experiment) -> int:
    """Projector output tokens of all images of a row."""
    return token_flow(cfg).projected


def seconds(cfg: Experiment, step_seconds: float) -> float:
    """Seconds of all training steps, at a measured speed."""
    return cfg.train.steps * step_seconds


AXES = {
    "training_flops": training_flops,
    "parameters": parameters,
    "image_tokens": image_tokens,
    "examples": examples,
    "seconds": seconds,
}


def axis_label(axis: str) -> str:
    """Returns the name of an axis for use in a sentence."""
    return axis.replace("_", " ").replace("flops", "FLOPs")


@dataclass(frozen=True)
class Match:
    """An arm on an axis."""

    axis: str
    arm: str
    field: str | None  # solved for; None: the arm was taken as it is
    number: int | None  # value of the field
    value: float  # of the arm on the axis
    target: float  # of the reference on the axis

    @property
    def residual(self) -> float:
        """Relative difference from the reference."""
        return self.value / self.target - 1 if self.target else float(self.value != self.target)


def solve(cfg: Experiment, field: str, value: AxisValue, target: float) -> Experiment:
    """Returns the valid experiment whose integer `field` brings `value` closest to the target.

    Raises:
      ConfigError: the value does not grow with the field.
    """
    if value(cfg) == target:
        return cfg
    _check_growth(cfg, field, value)

    # An invalid experiment counts as too large, so that the search turns back from it.
    def is_above(experiment: Experiment | None) -> bool:
        return experiment is None or value(experiment) > target

    start = flat(cfg)[field]
    low, high = 0, start
    if not is_above(cfg):
        low, high = start, max(2 * start, 1)
        while high < MAX_VALUE and not is_above(_override_valid(cfg, field, high)):
            low, high = high, 2 * high
    while middle := _valid_between(cfg, field, low, high):
        if is_above(_override_valid(cfg, field, middle)):
            high = middle
        else:
            low = middle
    candidates = [_override_valid(cfg, field, number) for number in (low, high)]
    return min(filter(None, candidates), key=lambda experiment: abs(value(experiment) - target))


def _check_growth(cfg: Experiment, field: str, value: AxisValue) -> None:
    """Compares the experiment with the next larger valid one, by powers of 2."""
    start = flat(cfg)[field]
    for doublings in range(1, MAX_VALUE.bit_length()):
        number = max(start, 1) << doublings
        larger = _override_valid(cfg, field, number)
        if larger is None:
            continue
        if value(larger) <= value(cfg):
            raise ConfigError(
                f"{field} cannot be solved for: with {number} instead of {start}, "
                f"{value(cfg):.6g} becomes {value(larger):.6g}, which is not larger."
            )
        return


def _valid_between(cfg: Experiment, field: str, low: int, high: int) -> int | None:
    """Returns the integer closest to the middle of (low, high) whose experiment is valid."""
    middle = (low + high) // 2
    for distance in range(high - low):
        for number in (middle - distance, middle + distance):
            if low < number < high and _override_valid(cfg, field, number):
                return number
    return None


def _override_valid(cfg: Experiment, field: str, number: int) -> Experiment | None:
    """Returns the experiment with the field set, or None if that is invalid."""
    try:
        return validate(override(cfg, {field: number}))
    except UserError:
        return None


def check(matches: list[Match], tolerance: float) -> None:
    """Raises ConfigError with all arms that differ from the reference by more than `tolerance`."""
    missed = [_describe(match) for match in matches if abs(match.residual) > tolerance]
    if missed:
        raise ConfigError(
            f"arms cannot be matched: {'; '.join(missed)} (tolerance {tolerance:.1%})."
        )


def _describe(match: Match) -> str:
    best = (
        f"at best, with {match.field} {match.number}" if match.field else "and solves for no field"
    )
    return (
        f"{match.arm} misses {match.axis} by {match.residual:+.1%} "
        f"({match.value:.6g}, reference {match.target:.6g}), {best}"
    )
