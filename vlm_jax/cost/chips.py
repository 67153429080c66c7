"""Peak rates of accelerators, from their makers' documents: of one chip; GB are powers of ten.

TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, "System architecture". Interconnect is given
there for both directions together; here it is one direction, over all links of a chip.
GPUs: NVIDIA's datasheets of the SXM boards, dense rates; NVLink is given for both directions, too.
"""

import math
from dataclasses import dataclass

from vlm_jax.config import ConfigError

GIB = 2**30
GB = 10**9


@dataclass(frozen=True)
class Chip:
    """Peak rates of one accelerator chip.

    `float32_flops` is for float32 inputs at JAX's default precision (jax.lax.Precision.DEFAULT):
    one pass of bfloat16 on a TPU, TensorFloat-32 on an NVIDIA GPU.
    """

    name: str
    device_kind: str  # prefix of `jax.Device.device_kind`
    bfloat16_flops: float  # FLOP/s of matrix products
    float32_flops: float
    hbm_bytes: float
    hbm_bytes_per_second: float
    interconnect_bytes_per_second: float  # sent by the chip over all its links
    #: topologies that can be rented and that the TPU compiler knows
    slices: tuple[str, ...] = ()

    def flops_per_second(self, dtype: str) -> float:
        return {"bfloat16": self.bfloat16_flops, "float32": self.float32_flops}[dtype]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
    "16x16x16",
)
CHIPS = (
    # docs/v4: 275 TFLOPs, 32 GiB at 1,200 GBps. Interconnect: 6 links of 50 GB/s (Jouppi et al.
    # 2023, table 4).
    Chip("v4", "TPU v4", 275e12, 275e12, 32 * GIB, 1200 * GB, 300 * GB, CUBES),
    # docs/v5e: 197 TFLOPs, 16 GB at 819 GBps, interconnect 400 GBps in both directions.
    Chip("v5e", "TPU v5 lite", 197e12, 197e12, 16 * GIB, 819 * GB, 200 * GB, FLAT),
    # docs/v5p: 459 TFLOPs, 95 GB at 2,765 GBps, interconnect 1,200 GBps in both directions.
    Chip("v5p", "TPU v5", 459e12, 459e12, 95 * GIB, 2765 * GB, 600 * GB, CUBES),
    # docs/v6e: 918 TFLOPs, 32 GB at 1,638 GBps, interconnect 800 GBps in both directions.
    Chip("v6e", "TPU v6 lite", 918e12, 918e12, 32 * GIB, 1638 * GB, 400 * GB, FLAT),
    # A100 datasheet (nvidia.com/a100): 312 TFLOPs bfloat16, 156 TF32, 2,039 and 1,555 GB/s, NVLink
    # 600 GB/s.
    Chip("A100-80GB", "NVIDIA A100-SXM4-80GB", 312e12, 156e12, 80 * GIB, 2039 * GB, 300 * GB),
    Chip("A100-40GB", "NVIDIA A100-SXM4-40GB", 312e12, 156e12, 40 * GIB, 1555 * GB, 300 * GB),
    # H100 datasheet (nvidia.com/h100): with sparsity 1,979 TFLOPs bfloat16 and 989 TF32, half of it
    # dense; 3.35 TB/s, NVLink 900 GB/s.
    Chip("H100", "NVIDIA H100 80GB HBM3", 989.5e12, 494.7e12, 80 * GIB, 3350 * GB, 450 * GB),
    # H200 datasheet (nvidia.com/h200): the rates of an H100; 141 GB at 4.8 TB/s, NVLink 900 GB/s.
    Chip("H200", "NVIDIA H200", 989.5e12, 494.7e12, 141 * GB, 4800 * GB, 450 * GB),
)


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip of a `jax.Device.device_kind`; None if it is not in CHIPS, such as a CPU."""
    # "TPU v5" is also a prefix of "TPU v5 lite": the longest prefix decides.
    chips = [chip for chip in CHIPS if device_kind.startswith(chip.device_kind)]
    return max(chips, key=lambda chip: len(chip.device_kind), default=None)


def parse_slice(topology: str) -> tuple[Chip, int]:
    """Parses a topology such as `v5e:8x8` into the chip and the number of chips.

    Raises:
      ConfigError: the topology is not in CHIPS; the message lists all of them.
    """
    name, _, layout = topology.partition(":")
    for chip in CHIPS:
        if chip.name == name and layout in chip.slices:
            return chip, math.prod(map(int, layout.split("x")))
    valid = "; ".join(f"{chip.name}:{' '.join(chip.slices)}" for chip in CHIPS if chip.slices)
    raise ConfigError(
        f"--topology {topology!r} is not a TPU slice: choose CHIP:LAYOUT from {valid}."
    )
