"""How fast the devices could multiply at best, against which a step is held."""

import functools
import time

import jax
import jax.numpy as jnp

from vlm_jax.cost.chips import chip_of

SIDE = 1024  # of the matrices that are multiplied to measure a CPU


def peak_flops_per_second(dtype: str) -> float | None:
    """FLOP/s of matrix products, all devices of all processes together: a chip's from the table, a CPU's measured once.

    None for an accelerator that the table does not name.
    """
    device = jax.devices()[0]
    if (
        device.platform == "cpu"
    ):  # however many devices it is told to be, it is one machine for each process
        return _measured_flops_per_second() * jax.process_count()
    chip = chip_of(device.device_kind)
    return chip and chip.flops_per_second(dtype) * jax.device_count()


@functools.cache
def _measured_flops_per_second() -> float:
    """The best of a few float32 products on the CPU: other work can only slow one down."""
    matrix = jax.device_put(jnp.ones((SIDE, SIDE), jnp.float32), jax.local_devices()[0])
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()

    def seconds() -> float:
        begun = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        return time.perf_counter() - begun

    return 2 * SIDE**3 / min(seconds() for _ in range(10))
