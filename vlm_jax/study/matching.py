"""Axes on which arms are made equal, and the field that is solved for.

A value of an axis must grow with the field; it is found by doubling and halving, then by bisection over the integers,
among experiments that are valid.
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
from vlm_jax.study.changes import changed

LARGEST = 1 << 30  # of a field that is solved for


def parameters(cfg: Experiment) -> int:
    """Numbers that the model consists of, frozen ones too."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(_model(cfg))))


def training_flops(cfg: Experiment) -> float:
    """FLOPs of the whole training (`vlm_jax.cost.flops`); what an arm builds on is not in it."""
    return cfg.train.steps * flops_a_step(cfg)


def flops_a_step(cfg: Experiment) -> float:
    return _flops_a_step(replace(cfg, train=replace(cfg.train, steps=1), seed=0, workdir=""))


_flops_a_step = functools.cache(train_flops)


def examples(cfg: Experiment) -> int:
    """Rows that are seen in training, repeated ones too: an image with its questions, or packed conversations."""
    return cfg.train.steps * cfg.train.batch_size


def image_tokens(cfg: Experiment) -> int:
    """Tokens of all images of a row, as they leave the projector."""
    return token_flow(cfg).projected


def seconds(cfg: Experiment, step_seconds: float) -> float:
    """Wall time of all steps, at a measured speed."""
    return cfg.train.steps * step_seconds


AXES = {
    "training_flops": training_flops,
    "parameters": parameters,
    "image_tokens": image_tokens,
    "examples": examples,
    "seconds": seconds,
}


def axis_label(axis: str) -> str:
    """An axis as it stands in a sentence."""
    return axis.replace("_", " ").replace("flops", "FLOPs")


Value = Callable[[Experiment], float]


def _model(cfg: Experiment) -> Experiment:
    """What parameters depend on, so that a model is traced once."""
    plain = Experiment()
    return replace(cfg, train=plain.train, optim=plain.optim, eval=plain.eval, seed=0, workdir="")


@dataclass(frozen=True)
class Match:
    """An arm on an axis."""

    axis: str
    arm: str
    field: str  # that was solved for; "": none
    number: int | None  # its value
    value: float  # of the arm on the axis
    target: float  # of the reference

    @property
    def residual(self) -> float:
        """The share by which the arm misses the reference."""
        return self.value / self.target - 1 if self.target else float(self.value != self.target)


def solve(cfg: Experiment, free: str, value: Value, target: float) -> Experiment:
    """The experiment, valid as `cfg` is, whose whole-numbered field `free` brings `value` nearest to the target.

    Raises:
      ConfigError: a larger number is no larger value.
    """
    if value(cfg) == target:
        return cfg
    _check_growth(cfg, free, value)

    def reaches(one: Experiment | None) -> bool:
        return one is None or value(one) > target

    start = flat(cfg)[free]
    below, above = 0, start
    if not reaches(cfg):
        below, above = start, max(2 * start, 1)
        while above < LARGEST and not reaches(_with(cfg, free, above)):
            below, above = above, 2 * above
    while middle := _valid_between(cfg, free, below, above):
        if reaches(_with(cfg, free, middle)):
            above = middle
        else:
            below = middle
    found = [one for number in (below, above) if (one := _with(cfg, free, number))]
    return min(found, key=lambda one: abs(value(one) - target))


def _check_growth(cfg: Experiment, free: str, value: Value) -> None:
    start = flat(cfg)[free]
    numbers = (max(start, 1) << doublings for doublings in range(1, LARGEST.bit_length()))
    larger = next((one for number in numbers if (one := _with(cfg, free, number))), None)
    if larger and value(larger) <= value(cfg):
        raise ConfigError(
            f"{free} cannot be solved for: with {flat(larger)[free]} in the place of {start}, {value(cfg):.6g} becomes "
            f"{value(larger):.6g}, which is no more."
        )


def _valid_between(cfg: Experiment, free: str, below: int, above: int) -> int | None:
    """The number nearest to the middle between two others with which the experiment is valid."""
    middle = (below + above) // 2
    for distance in range(above - below):
        for number in (middle - distance, middle + distance):
            if below < number < above and _with(cfg, free, number):
                return number
    return None


def _with(cfg: Experiment, free: str, number: int) -> Experiment | None:
    """The experiment with the number, if it is valid."""
    try:
        return validate(changed(cfg, {free: number}))
    except UserError:
        return None


def check(matches: list[Match], tolerance: float) -> None:
    """Raises ConfigError where an arm misses the reference by more than the tolerance; names all that do."""
    missed = [match for match in matches if abs(match.residual) > tolerance]
    if missed:
        raise ConfigError(
            "arms cannot be matched: "
            + "; ".join(map(_miss, missed))
            + f" (tolerance {tolerance:.1%})."
        )


def _miss(match: Match) -> str:
    how = (
        f"with {match.field} {match.number} at best"
        if match.field
        else "and nothing is free to be solved for"
    )
    return (
        f"{match.arm} misses {match.axis} by {match.residual:+.1%} ({match.value:.6g} against {match.target:.6g} of "
        f"the reference), {how}"
    )
