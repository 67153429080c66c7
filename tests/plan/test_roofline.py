"""Seconds of a step by hand: each resource decides in its turn."""

from dataclasses import replace

import pytest

from vlm_jax import testing
from vlm_jax.cost.chips import Chip
from vlm_jax.cost.flops import token_flow
from vlm_jax.plan import document
from vlm_jax.plan.hlo import Collective, Program
from vlm_jax.plan.roofline import roofline

CHIP = Chip(
    "chip",
    "of no maker",
    bfloat16_flops=1000.0,
    float32_flops=500.0,
    hbm_bytes=1.0,
    hbm_bytes_per_second=100.0,
    interconnect_bytes_per_second=10.0,
)


def seconds(program, dtype="bfloat16"):
    limits = roofline(program, CHIP, dtype)
    return [limits.compute, limits.hbm, limits.interconnect, limits.overlapped, limits.serial]


def collective(kind, times=1):
    return Collective(kind, bytes=20, chips=4, times=times, source="")


# 20 bytes among 4 chips: what each sends in one.
SENT = {
    "all-gather": 15,
    "all-to-all": 15,
    "all-reduce": 30,
    "reduce-scatter": 60,
    "collective-permute": 20,
}


def test_products_decide_by_the_rate_of_their_dtype():
    program = Program(flops=6000, hbm_bytes=300, collectives=[collective("all-gather", times=2)])
    assert seconds(program, "bfloat16") == pytest.approx([6, 3, 3, 6, 9])
    assert seconds(program, "float32") == pytest.approx([12, 3, 3, 12, 15])


def test_memory_decides():
    program = Program(flops=2000, hbm_bytes=800, collectives=[collective("all-reduce")])
    assert seconds(program) == pytest.approx([2, 8, 3, 8, 11])


@pytest.mark.parametrize("kind", SENT)
def test_each_kind_of_collective_decides(kind):
    program = Program(flops=1000, hbm_bytes=50, collectives=[collective(kind, times=7)])
    sent = 7 * SENT[kind] / 10
    assert seconds(program) == pytest.approx([1, 0.5, sent, sent, 1 + sent])


def test_collectives_are_sent_one_after_the_other():
    program = Program(collectives=[collective(kind) for kind in SENT])
    assert seconds(program) == pytest.approx([0, 0, 14, 14, 14])


def test_speeds_are_of_all_chips_and_the_model_s_own_flops():
    cfg = testing.tiny()
    cfg = replace(cfg, train=replace(cfg.train, batch_size=40, compute_dtype="bfloat16"))
    sequence = token_flow(cfg).sequence
    program = Program(flops=4000, hbm_bytes=500, collectives=[collective("all-gather", times=2)])
    result = document.speed(cfg, CHIP, program, devices=4, model_flops=12000)
    assert result["xla_flops"] == 16000
    assert result["overlapped"] == pytest.approx(
        {"step_seconds": 5, "mfu": 0.6, "tokens_per_second": 8 * sequence, "images_per_second": 8}
    )
    assert result["serial"] == pytest.approx(
        {"step_seconds": 8, "mfu": 0.375, "tokens_per_second": 5 * sequence, "images_per_second": 5}
    )
