"""The device, its software and the commit, and the speed of a matrix product."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import turns

from vlm_jax.cost.chips import find_chip

# Installed distributions that are named in the results.
DISTRIBUTIONS = (
    "jax",
    "jaxlib",
    "flax",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
    "libtpu",
)
PRODUCT_SIDE = 8192
TINY_PRODUCT_SIDE = 512


def collect() -> dict:
    device = jax.devices()[0]
    chip = find_chip(device.device_kind)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "visible devices": jax.device_count(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "backend": getattr(device.client, "platform_version", ""),
        "memory GiB": memory_limit_bytes(device) / 2**30,
        "versions": ", ".join(_versions()),
        "python": platform.python_version(),
        "processor": f"{os.cpu_count()} CPUs, {platform.machine()}",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=40"),
        "datasheet bfloat16 TFLOP/s": chip.bfloat16_flops / 1e12 if chip else "not in CHIPS",
        "matrix product bfloat16 TFLOP/s": _product_flops_per_second(device) / 1e12,
    }


def memory_limit_bytes(device: jax.Device) -> int:
    """Returns the memory that JAX may use; 0: unknown, as on a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def _product_flops_per_second(device: jax.Device) -> float:
    """Returns the rate of the fastest bfloat16 product of random square matrices."""
    side = TINY_PRODUCT_SIDE if device.platform == "cpu" else PRODUCT_SIDE
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    times = turns.times(lambda: product(x, x).block_until_ready(), seconds=0.2)
    return 2 * side**3 / times["best_seconds"]


def _versions() -> list[str]:
    versions = []
    for name in DISTRIBUTIONS:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _output(*command: str) -> str:
    """Returns the first line that a command prints; empty if it fails."""
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip()
