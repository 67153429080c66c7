"""Parts of a model: the units that are frozen, scaled in learning rate and counted in FLOPs."""

import dataclasses
import itertools

from vlm_jax.config import LrMult, Optim
from vlm_jax.nn.blocks import BLOCK, needs_image

PARTS = tuple(field.name for field in dataclasses.fields(LrMult))


def find_part(path: tuple[str, ...]) -> str:
    """Returns the part that a parameter, or a module, belongs to by its path in the model.

    Cross-attention sublayers are inside the decoder's blocks and are a part of their own.
    """
    part, *modules = path
    for module, child in itertools.pairwise(modules):
        if part == "decoder" and module.startswith(BLOCK) and needs_image(child):
            return "cross_attention"
    return part


def trained_parts(cfg: Optim) -> set[str]:
    return {part for part, lr_mult in dataclasses.asdict(cfg.lr_mult).items() if lr_mult > 0}
