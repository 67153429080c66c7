"""Which parts are trained, and at which rate."""

import dataclasses
import math

import optax
import optax.contrib
from flax import traverse_util

from vlm_jax.config import Optim
from vlm_jax.nn.parts import part_of, trained_parts

MATRICES = (
    "kernel",
    "table",
)  # they decay; the number of dimensions says nothing where layers are stacked


def split(params, cfg: Optim) -> tuple[dict, dict]:
    """Parameters -> (trained, frozen), two flat dicts by path; `join` puts them together again.

    Only the trained ones are differentiated, so a frozen part costs neither gradient nor optimizer state.
    """
    trained = trained_parts(cfg)
    flat = traverse_util.flatten_dict(params)
    return (
        {path: x for path, x in flat.items() if part_of(path) in trained},
        {path: x for path, x in flat.items() if part_of(path) not in trained},
    )


def join(trained: dict, frozen: dict):
    return traverse_util.unflatten_dict({**trained, **frozen})


def schedule(cfg: Optim, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine down to `final_lr_fraction` of the peak."""
    warmup = min(cfg.warmup_steps, max(steps - 1, 1))
    return optax.warmup_cosine_decay_schedule(
        0.0,
        cfg.learning_rate,
        warmup,
        max(steps, warmup + 1),
        cfg.learning_rate * cfg.final_lr_fraction,
    )


def optimizer(cfg: Optim, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW or Muon, for the flat dict of trained parameters that `split` makes.

    Weight decay is for matrices; the learning rate of each part is the schedule times its `lr_mult`.
    """
    scales = dataclasses.asdict(cfg.lr_mult)

    def is_matrix(params):
        return {path: path[-1] in MATRICES for path in params}

    def scale_parts(updates, _):
        return {path: update * scales[part_of(path)] for path, update in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        _adam(cfg) if cfg.kind == "adamw" else _muon(cfg),
        optax.add_decayed_weights(cfg.weight_decay, is_matrix),
        optax.stateless(scale_parts),
        optax.scale_by_learning_rate(schedule(cfg, steps)),
    )


def _adam(cfg: Optim) -> optax.GradientTransformation:
    return optax.scale_by_adam(cfg.beta1, cfg.beta2)


def _muon(cfg: Optim) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for kernels, Adam for embeddings, norms, biases and gates.

    An orthogonal update is scaled to a root mean square of 1, so that one learning rate serves both.
    """

    def groups(params):
        return {path: "muon" if path[-1] == "kernel" else "adam" for path in params}

    def unit_rms(updates, _):
        return {
            path: update if _masked(update) else _unit_rms(path, update)
            for path, update in updates.items()
        }

    orthogonal = optax.contrib.scale_by_muon(weight_dimension_numbers=_kernel_sides)
    muon = optax.chain(orthogonal, optax.stateless(unit_rms))
    return optax.partition({"muon": muon, "adam": _adam(cfg)}, groups)


def _masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)


def _kernel_sides(params) -> dict:
    """The letters of every kernel that are contracted and those that come out; `L`, stacked in front, is neither."""

    def sides(path, kernel):
        first = 1 if "layers" in path else 0
        middle = first + (
            2 if path[-2] == "out" else 1
        )  # attention's output contracts heads and their numbers
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(first, middle)), tuple(range(middle, kernel.ndim))
        )

    return {
        path: kernel if _masked(kernel) else sides(path, kernel) for path, kernel in params.items()
    }


def _unit_rms(path, update):
    sides = _kernel_sides({path: update})[path]
    inputs, outputs = (
        math.prod(update.shape[i] for i in axes)
        for axes in (sides.reduction_axis, sides.output_axis)
    )
    return update * math.sqrt(max(inputs, outputs))
