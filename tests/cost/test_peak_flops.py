"""Peak FLOP/s: the rate of every chip in the table, and the measured rate of a CPU."""

import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from vlm_jax import axes
from vlm_jax.config import Mesh
from vlm_jax.cost import peak_flops
from vlm_jax.cost.flops import train_flops
from vlm_jax.cost.peak_flops import peak_flops_per_second
from vlm_jax.testing import tiny
from vlm_jax.train import inputs


@pytest.mark.parametrize(
    "kind, dtype, expected",
    [
        ("TPU v5 lite", "bfloat16", 4 * 197e12),
        ("TPU v5p", "bfloat16", 4 * 459e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 4 * 312e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 4 * 156e12),
        ("TPU v99", "bfloat16", None),
    ],
)
def test_of_accelerators_it_is_what_the_table_says_times_their_number(
    kind, dtype, expected, monkeypatch
):
    monkeypatch.setattr(
        jax, "devices", lambda: [SimpleNamespace(platform="tpu", device_kind=kind)] * 4
    )
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert peak_flops_per_second(dtype) == expected


def timed_flops_per_second(side=1024):
    """The best of twenty products, as other work on the machine slows some of them down."""
    product, matrix = jax.jit(jnp.matmul), jnp.ones((side, side))
    seconds = []
    for _ in range(20):
        begun = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / min(seconds)


def test_of_a_cpu_it_is_near_that_of_a_product_timed_here():
    """Other work may slow down one of both; a product that is only launched takes a thousandth."""
    peak_flops._measure_flops_per_second.cache_clear()
    assert 1 / 30 < peak_flops_per_second("float32") / timed_flops_per_second() < 30


def test_each_process_is_a_machine_of_its_own(monkeypatch):
    of_one_process = peak_flops_per_second("float32")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert peak_flops_per_second("float32") == 2 * of_one_process


def test_a_step_at_peak_is_its_flops_by_that_rate(monkeypatch):
    cfg, mesh = tiny(), axes.make_mesh(Mesh())
    monkeypatch.setattr(inputs, "peak_flops_per_second", lambda dtype: 1e9)
    assert inputs.seconds_at_peak(cfg, mesh) == train_flops(cfg) / 1e9
    monkeypatch.setattr(inputs, "peak_flops_per_second", lambda dtype: None)
    assert inputs.seconds_at_peak(cfg, mesh) is None
