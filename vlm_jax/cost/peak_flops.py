"""Peak matmul throughput of the devices, for MFU (model FLOPs utilization)."""

import functools
import time

import jax
import jax.numpy as jnp

from vlm_jax.cost.chips import find_chip

SIDE = 1024  # rows and columns of the matrices that are multiplied to measure a CPU


def peak_flops_per_second(dtype: str) -> float | None:
    """Returns peak FLOP/s of matrix products over all devices of all processes.

    A chip's rate comes from its datasheet, a CPU's is measured once. None for an accelerator that
    is not in `chips.CHIPS`.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        # The CPU devices of a process, however many, share one machine.
        return _measure_flops_per_second() * jax.process_count()
    chip = find_chip(device.device_kind)
    return None if chip is None else chip.flops_per_second(dtype) * jax.device_count()


@functools.cache
def _measure_flops_per_second() -> float:
    """Returns the rate of the fastest of ten float32 products on the CPU."""
    matrix = jax.device_put(jnp.ones((SIDE, SIDE), jnp.float32), jax.local_devices()[0])
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()

    def seconds() -> float:
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        return time.perf_counter() - start

    # Other work on the machine can only slow a product down.
    return 2 * SIDE**3 / min(seconds() for _ in range(10))
