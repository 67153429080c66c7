"""Parts of a model: the units that are frozen, scaled in learning rate and counted in FLOPs."""

import dataclasses
import itertools
from collections.abc import Iterable

from vlm_jax.config import LrMult, Optim
from vlm_jax.nn.blocks import BLOCK, GATE, needs_image
from vlm_jax.nn.layers import LORA_A, LORA_B

Path = tuple[str, ...]
PARTS = tuple(field.name for field in dataclasses.fields(LrMult))


def find_part(path: Path) -> str:
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


def is_adapter(path: Path) -> bool:
    """Returns whether a parameter belongs to a LoRA adapter."""
    return path[-1] in (LORA_A, LORA_B)


def is_cross_attention_gate(path: Path) -> bool:
    """Returns whether a parameter is the gate of a sublayer of cross-attention."""
    return path[-1].endswith(GATE) and find_part(path) == "cross_attention"


def trained_paths(paths: Iterable[Path], cfg: Optim) -> set[Path]:
    """Returns the paths of the trained parameters, given those of all parameters.

    Of a part with adapters, only these are trained.
    """
    by_part: dict[str, list[Path]] = {part: [] for part in trained_parts(cfg)}
    for path in paths:
        by_part.setdefault(find_part(path), []).append(path)
    trained = set()
    for part in trained_parts(cfg):
        adapters = filter(is_adapter, by_part[part])
        trained |= set(adapters) or set(by_part[part])
    return trained
