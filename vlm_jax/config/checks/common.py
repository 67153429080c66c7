"""Functions that checks share."""

import re
from collections.abc import Callable

from vlm_jax.config import (
    FUSION_STYLES,
    ConfigError,
    Fusion,
)
from vlm_jax.config.hints import either

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
NAME_CHARACTERS = "a name has letters, digits, '.', '_', '+' and '-'"


def list_styles(accepts: Callable[[Fusion], bool]) -> str:
    """Lists the fusion styles that `accepts` returns True for, for a message."""
    return either([kind for kind in FUSION_STYLES if accepts(Fusion(kind))])


def is_changed(section, name: str) -> bool:
    return getattr(section, name) != getattr(type(section)(), name)


def check_layers(field: str, layers: tuple[int, ...], depth: int) -> None:
    """Raises ConfigError if a field names a block that the decoder does not have."""
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise ConfigError(f"{field} names layer {outside[0]}: choose from 0 to {depth - 1}.")
