"""Settings of LoRA adapters."""

import math
from dataclasses import dataclass

from vlm_jax.config.errors import ConfigError


@dataclass(frozen=True)
class LoraTarget:
    """An element of `Lora.targets`: kernels, and the rank and alpha of their adapters."""

    name: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class Lora:
    """LoRA (Hu et al. 2021): kernels get trained adapters; the rest of their part is frozen."""

    rank: int | None = None  # rank of an adapter; None: no adapters
    alpha: float = 16.0  # factor of an adapter's output, divided by the rank
    dropout: float = 0.0  # share of an adapter's inputs that training sets to 0
    #: kernels with an adapter: PART (decoder, cross_attention, vision or projector),
    #: PART.attention, PART.mlp or PART.KERNEL such as decoder.query; NAME:RANK or NAME:RANK:ALPHA
    #: gives these a rank and alpha of their own
    targets: tuple[str, ...] = ("decoder",)
    #: divide alpha by the square root of the rank instead (Kalajdzievski 2023)
    rslora: bool = False

    @property
    def parsed_targets(self) -> tuple[LoraTarget, ...]:
        """The targets, each with its rank and alpha; empty without a rank.

        Raises:
          ConfigError: a target is not NAME, NAME:RANK or NAME:RANK:ALPHA.
        """
        if self.rank is None:
            return ()
        return tuple(map(self._parse, self.targets))

    def _parse(self, target: str) -> LoraTarget:
        name, *numbers = target.split(":")
        try:
            rank = int(numbers[0]) if numbers else self.rank
            alpha = float(numbers[1]) if len(numbers) > 1 else self.alpha
        except ValueError:
            rank = alpha = 0
        if len(numbers) > 2 or rank < 1 or not 0 < alpha < math.inf:
            raise ConfigError(
                f"lora.targets {target!r} is not NAME, NAME:RANK or NAME:RANK:ALPHA, such as "
                "decoder.mlp:8:16."
            )
        return LoraTarget(name, rank, alpha)

    def scale(self, rank: int, alpha: float) -> float:
        """Returns the factor of an adapter's output."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)
