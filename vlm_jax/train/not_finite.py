"""Which parameter spoilt a step whose loss or gradient is NaN or infinite."""

import math

from vlm_jax.nn.parts import PARTS, part_of


def first_nonfinite_parameter(finite: dict[str, bool], largest: dict[str, float]) -> str:
    """Names the parameter where it began, and its part, out of which gradients are finite and the parameters' sizes.

    That is the first bad parameter of the forward pass, or else the first gradient that the backward pass spoils. Where
    all of those are spoilt the forward pass was: there the largest number is named.
    """
    bad = sorted((path for path, size in largest.items() if not math.isfinite(size)), key=_place)
    if bad:
        return f"the first parameter that is not finite is of {_named(bad[0])}, {len(bad)} of {len(largest)} are not"
    spoilt = sorted((path for path, is_finite in finite.items() if not is_finite), key=_place)
    if not spoilt:
        return "each gradient is finite"
    if len(spoilt) < len(finite):
        return f"the backward pass spoils that of {_named(spoilt[-1])} first, {len(spoilt)} of {len(finite)} gradients"
    path = max(largest, key=largest.get)
    largest_number = f"the largest number, {largest[path]:.3g}, is of {_named(path)}"
    return f"the parameters are finite and no gradient is; {largest_number}"


def _place(path: str) -> tuple:
    """Where a parameter is read in the forward pass."""
    names = tuple(path.split("/"))
    ends = {"patch_embed": 0, "embedding": 0, "final_norm": 2, "free_head": 3}
    return PARTS.index(part_of(names)), ends.get(names[1], 1), path


def _named(path: str) -> str:
    return f"{part_of(tuple(path.split('/')))} ({path})"
