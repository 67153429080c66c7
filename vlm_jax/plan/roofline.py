"""Lower bound on the time of a step, from its costs and a chip's peak rates.

Source: the roofline model (Williams et al. 2009).
"""

from dataclasses import dataclass

from vlm_jax.cost.chips import Chip
from vlm_jax.plan.hlo import Program


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step; each resource at its peak rate."""

    compute: float
    hbm: float
    interconnect: float

    @property
    def overlapped(self) -> float:
        """All three at the same time."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def serial(self) -> float:
        """Without overlap of collectives and compute."""
        return max(self.compute, self.hbm) + self.interconnect


def roofline(program: Program, chip: Chip, dtype: str) -> Roofline:
    """Returns the bounds; collectives use all links of a chip in one direction."""
    sent = sum(collective.sent_bytes * collective.times for collective in program.collectives)
    return Roofline(
        program.flops / chip.flops_per_second(dtype),
        program.hbm_bytes / chip.hbm_bytes_per_second,
        sent / chip.interconnect_bytes_per_second,
    )
