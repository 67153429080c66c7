"""Parts of a model: the units that are frozen, scaled in learning rate and counted in FLOPs."""

import dataclasses

from vlm_jax.config import LrMult, Optim

PARTS = tuple(field.name for field in dataclasses.fields(LrMult))


def part_of(path: tuple[str, ...]) -> str:
    """Returns the part that a parameter, or a module, belongs to by its path in the model.

    Cross-attention sublayers are inside the decoder's blocks and are a part of their own.
    """
    if path[0] == "decoder" and any(name.startswith("cross") for name in path):
        return "cross_attention"
    return path[0]


def trained_parts(cfg: Optim) -> set[str]:
    return {part for part, lr_mult in dataclasses.asdict(cfg.lr_mult).items() if lr_mult > 0}
