"""Checks that a step is finite, and the parameter in which NaN or infinity began."""

import math

from vlm_jax.config import NonFiniteError
from vlm_jax.nn.parts import PARTS, find_part


class NonFiniteStepError(NonFiniteError):
    """A step whose loss or gradients are not finite."""

    def __init__(self, message: str, data_state: dict):
        super().__init__(message)
        self.data_state = data_state  # position of the step's batch in the data


def check_finite(step: int, metrics: dict, data_state: dict) -> None:
    """Raises NonFiniteStepError if the loss or the norm of the gradients is not finite.

    Args:
      metrics: of `train.step.train_step`, on the host.
      data_state: position of the step's batch in the data.
    """
    for name in ("loss", "grad_norm"):
        value = float(metrics[name])
        if not math.isfinite(value):
            origin = first_nonfinite_parameter(metrics["finite"], metrics["largest"])
            message = f"step {step}: the {name} is {value}; {origin}. Earlier checkpoints are kept."
            raise NonFiniteStepError(message, data_state)


def first_nonfinite_parameter(finite: dict[str, bool], largest: dict[str, float]) -> str:
    """Names the parameter in which NaN or infinity began, and its part.

    That is the first non-finite parameter of the forward pass, or else the first non-finite
    gradient of the backward pass. If no gradient is finite, the forward pass overflowed: the
    parameter with the largest value is named.

    Args:
      finite: path -> whether the parameter's gradient is finite.
      largest: path -> the parameter's largest absolute value.
    """
    bad_params = [path for path, size in largest.items() if not math.isfinite(size)]
    if bad_params:
        first = min(bad_params, key=_forward_order)
        return (
            f"first non-finite parameter: {_describe(first)} ({len(bad_params)} of {len(largest)} "
            "parameters)"
        )
    bad_gradients = [path for path, is_finite in finite.items() if not is_finite]
    if not bad_gradients:
        return "every gradient is finite"
    if len(bad_gradients) < len(finite):
        first = max(bad_gradients, key=_forward_order)
        return (
            f"first non-finite gradient in the backward pass: {_describe(first)} "
            f"({len(bad_gradients)} of {len(finite)} gradients)"
        )
    path = max(largest, key=largest.get)
    return (
        "all parameters are finite and no gradient is; the largest value is "
        f"{largest[path]:.3g}, of {_describe(path)}"
    )


def _forward_order(path: str) -> tuple:
    """Sorts parameters by their position in the forward pass."""
    names = tuple(path.split("/"))
    stages = {"patch_embed": 0, "embedding": 0, "final_norm": 2, "free_head": 3}
    return PARTS.index(find_part(names)), stages.get(names[1], 1), path


def _describe(path: str) -> str:
    return f"{path} of {find_part(tuple(path.split('/')))}"
