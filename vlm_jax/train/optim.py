"""The optimizer: trained parts, their learning rates, and the rule that scales gradients.

A new optimizer is one function and one row of `OPTIMIZERS`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import optax
import optax.contrib
from flax import traverse_util

from vlm_jax.axes import Partitioned
from vlm_jax.config import ConfigError, Experiment, Optim
from vlm_jax.config.hints import nearest
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.parts import Path, find_part, is_cross_attention_gate, trained_paths

Boxes = Mapping[Path, Partitioned]  # logical axes of the parameters, by path


def split(params, cfg: Optim) -> tuple[dict, dict]:
    """Splits parameters into (trained, frozen), two flat dicts by path; `join` is the inverse.

    Only trained parameters are differentiated, so that frozen parts cost neither gradients nor
    optimizer state.
    """
    params = traverse_util.flatten_dict(params)
    is_trained = trained_paths(params, cfg)
    trained = {path: x for path, x in params.items() if path in is_trained}
    return trained, {path: x for path, x in params.items() if path not in is_trained}


def join(trained: dict, frozen: dict):
    return traverse_util.unflatten_dict({**trained, **frozen})


def warmup_steps(cfg: Optim, steps: int) -> int:
    """Returns `optim.warmup_steps`, or what a shorter run has room for before its last step."""
    return min(cfg.warmup_steps, max(steps - 1, 1))


def schedule(cfg: Optim, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine decay to `final_lr_fraction` of the peak."""
    warmup = warmup_steps(cfg, steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=cfg.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=cfg.learning_rate * cfg.final_lr_fraction,
    )


def adamw(cfg: Optim, boxes: Boxes) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015); weight decay is decoupled (Loshchilov and Hutter 2019)."""
    return optax.scale_by_adam(cfg.beta1, cfg.beta2)


def muon(cfg: Optim, boxes: Boxes) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for kernels, Adam for embeddings, norms, biases and gates.

    Orthogonal updates are scaled to a root mean square of 1, so that one learning rate serves both.
    """

    def group(params):
        return {path: "muon" if boxes[path].is_kernel else "adam" for path in params}

    def dimension_numbers(params):
        return {
            path: x if _is_masked(x) else _muon_dimensions(boxes[path])
            for path, x in params.items()
        }

    def scale_to_unit_rms(updates, _):
        return {
            path: x if _is_masked(x) else x * _inverse_rms(boxes[path], x.shape)
            for path, x in updates.items()
        }

    orthogonal = optax.contrib.scale_by_muon(weight_dimension_numbers=dimension_numbers)
    kernels = optax.chain(orthogonal, optax.stateless(scale_to_unit_rms))
    return optax.partition({"muon": kernels, "adam": adamw(cfg, boxes)}, group)


def _is_masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)


def _muon_dimensions(box: Partitioned) -> optax.contrib.MuonDimensionNumbers:
    return optax.contrib.MuonDimensionNumbers(box.contracted_axes, box.output_axes)


def _inverse_rms(box: Partitioned, shape: tuple[int, ...]) -> float:
    """Returns 1 / RMS of an orthogonal matrix (inputs, outputs): sqrt(max(inputs, outputs))."""
    inputs = math.prod(shape[axis] for axis in box.contracted_axes)
    outputs = math.prod(shape[axis] for axis in box.output_axes)
    return math.sqrt(max(inputs, outputs))


# The update rule of each `optim.kind`. `optimizer` clips the gradients before it, and adds weight
# decay and learning rates after it.
OPTIMIZERS: dict[str, Callable[[Optim, Boxes], optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
}


def check_kind(cfg: Optim) -> None:
    """Raises ConfigError if `optim.kind` is not a row of `OPTIMIZERS`."""
    if cfg.kind not in OPTIMIZERS:
        raise ConfigError(
            f"optim.kind {cfg.kind!r} is not an optimizer{nearest(cfg.kind, OPTIMIZERS)}: "
            f"choose {', '.join(OPTIMIZERS)}."
        )


def optimizer(cfg: Experiment) -> optax.GradientTransformation:
    """Returns the optimizer for the flat dict of trained parameters that `split` makes.

    Gradients are clipped by their global norm and scaled by the rule of `optim.kind`. Kernels and
    embedding tables decay. The learning rate of a part is the schedule times its `lr_mult`,
    of the gates of cross-attention times `gate_lr_mult` as well.

    Raises:
      ConfigError: `optim.kind` is not a row of `OPTIMIZERS`.
    """
    check_kind(cfg.optim)
    boxes = traverse_util.flatten_dict(abstract_params(cfg))
    lr_mult = dataclasses.asdict(cfg.optim.lr_mult)

    def decays(params):
        # Not by the number of dimensions: stacked layers give vectors a second one.
        return {path: boxes[path].is_kernel or boxes[path].is_table for path in params}

    def scale(path: Path) -> float:
        gate = cfg.optim.gate_lr_mult if is_cross_attention_gate(path) else 1.0
        return gate * lr_mult[find_part(path)]

    def scale_parts(updates, _):
        return {path: update * scale(path) for path, update in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(cfg.optim.clip_norm),
        OPTIMIZERS[cfg.optim.kind](cfg.optim, boxes),
        optax.add_decayed_weights(cfg.optim.weight_decay, decays),
        optax.stateless(scale_parts),
        optax.scale_by_learning_rate(schedule(cfg.optim, cfg.train.steps)),
    )
