"""The loop over depth: what it repeats, and that its form changes nothing."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from vlm_jax.config import Fusion, Transformer
from vlm_jax.nn.blocks import (
    NOT_FUSED,
    Block,
    BlockFlags,
    Stack,
    repeating_period,
)
from vlm_jax.structs import BlockInputs

PLAIN = ("self", "mlp")
CROSSING = ("cross", "cross_mlp", "self", "mlp")
GATED = Fusion("cross_attention", gated=True)
CFG = Transformer(width=16, depth=4, heads=2, mlp_width=32)
RNG = np.random.default_rng(0)
X, MEMORY = (RNG.normal(size=(2, n, 16)).astype(np.float32) for n in (3, 5))


@pytest.mark.parametrize(
    "blocks, period",
    [
        ([PLAIN], [PLAIN]),
        ([PLAIN] * 6, [PLAIN]),
        ([CROSSING, PLAIN] * 3, [CROSSING, PLAIN]),
        ([CROSSING, PLAIN, PLAIN] * 2, [CROSSING, PLAIN, PLAIN]),
        ([PLAIN, CROSSING, PLAIN], [PLAIN, CROSSING, PLAIN]),  # nothing repeats
        ([CROSSING, PLAIN, CROSSING], [CROSSING, PLAIN, CROSSING]),  # not a whole number of times
    ],
)
def test_the_period_is_the_shortest_run_that_repeats(blocks, period):
    assert repeating_period(tuple(blocks)) == tuple(period)


def test_a_cross_block_every_k_makes_a_period_of_k():
    for k in (1, 2, 4):
        assert repeating_period(Fusion("cross_attention", cross_every=k).sublayers(8)) == (
            CROSSING,
        ) + (PLAIN,) * (k - 1)


def test_an_even_placement_as_in_mllama_is_a_short_period():
    blocks = Fusion("cross_attention", cross_layers=tuple(range(3, 40, 5))).sublayers(40)
    assert repeating_period(blocks) == (PLAIN, PLAIN, PLAIN, CROSSING, PLAIN)


def test_an_uneven_placement_is_its_own_period():
    assert (
        len(repeating_period(Fusion("cross_attention", cross_layers=(3, 7, 11, 14)).sublayers(16)))
        == 16
    )


def test_cross_blocks_stand_where_cross_layers_says():
    blocks = Fusion("cross_attention", cross_layers=(3, 7, 11)).sublayers(12)
    assert [i for i, block in enumerate(blocks) if "cross" in block] == [3, 7, 11]


def random_params(cfg, blocks, fusion=NOT_FUSED):
    init = functools.partial(Stack(cfg, blocks, fusion).init, jax.random.key(0))
    shapes = meta.unbox(jax.eval_shape(init, X, BlockInputs(memory=MEMORY)))["params"]
    return jax.tree.map(lambda s: RNG.normal(0, 0.3, s.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(cfg, blocks, fusion, params, x, context):
    return Stack(cfg, blocks, fusion).apply({"params": params}, x, context)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def one_block(cfg, sublayers, params, x, context):
    return Block(cfg, sublayers).apply({"params": params}, x, context, BlockFlags(), {})[0]


def test_the_loop_is_the_blocks_one_after_the_other():
    blocks = (CROSSING, PLAIN) * 2
    params, context = random_params(CFG, blocks), BlockInputs(memory=MEMORY)
    x = X
    for i, sublayers in enumerate(blocks):
        own = jax.tree.map(
            lambda stacked, turn=i // 2: stacked[turn], params["layers"][f"block_{i % 2}"]
        )
        x = one_block(CFG, sublayers, own, x, context)
    np.testing.assert_allclose(
        run(CFG, blocks, NOT_FUSED, params, X, context), x, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("unroll", [2, 4, 9])
def test_scan_is_unrolled(unroll):
    """Parameters and outputs are the same for a loop unrolled in part, as a whole, or beyond."""
    blocks, unrolled = (CROSSING,) * 4, replace(CFG, unroll=unroll)
    params, context = random_params(CFG, blocks), BlockInputs(memory=MEMORY)
    assert jax.tree.map(jnp.shape, random_params(unrolled, blocks)) == jax.tree.map(
        jnp.shape, params
    )
    looped = run(CFG, blocks, NOT_FUSED, params, X, context)
    np.testing.assert_allclose(
        run(unrolled, blocks, NOT_FUSED, params, X, context), looped, rtol=1e-4, atol=1e-4
    )


def test_the_program_does_not_grow_with_depth():
    def program(depth):
        blocks = (CROSSING, PLAIN) * (depth // 2)
        params = jax.eval_shape(lambda: random_params(replace(CFG, depth=depth), blocks))
        return str(
            run.trace(CFG, blocks, NOT_FUSED, params, X, BlockInputs(memory=MEMORY)).jaxpr
        ).count("\n")

    assert program(8) == program(2)


def test_gates_scale_what_crosses_and_closed_ones_let_nothing_through():
    blocks, context = (CROSSING,), BlockInputs(memory=MEMORY)
    params = random_params(CFG, blocks, fusion=GATED)
    block = params["layers"]["block_0"]
    names = {name for name in block if "gate" in name}
    assert names == {"cross_gate", "cross_mlp_gate"}

    def with_gates(value):
        gates = dict.fromkeys(names, np.full((1, 1), value, np.float32))
        return {"layers": {"block_0": block | gates}}

    closed, wide_open = with_gates(0.0), with_gates(100.0)
    ungated = {
        "layers": {"block_0": {name: value for name, value in block.items() if "gate" not in name}}
    }
    text_only = {
        "layers": {"block_0": {n: v for n, v in block.items() if not n.startswith("cross")}}
    }
    np.testing.assert_array_equal(
        run(CFG, blocks, GATED, closed, X, context),
        run(CFG, (PLAIN,), NOT_FUSED, text_only, X, BlockInputs()),
    )
    np.testing.assert_allclose(
        run(CFG, blocks, GATED, wide_open, X, context),
        run(CFG, blocks, NOT_FUSED, ungated, X, context),
        rtol=1e-5,
        atol=1e-5,
    )


def test_an_mlp_applies_to_tokens_without_an_image_where_only_their_attention_is_masked():
    fusion = replace(GATED, gate="vector", tokens_without_image="mask_attention")
    blocks, (rows, length, width) = (("cross", "cross_mlp"),), X.shape
    params = random_params(CFG, blocks, fusion)
    assert params["layers"]["block_0"]["cross_gate"].shape == (1, width)
    has_image = jnp.zeros((rows, length), bool).at[:, 1:].set(True)
    y = run(CFG, blocks, fusion, params, X, BlockInputs(memory=MEMORY, has_image=has_image))
    alone = run(CFG, blocks, fusion, params, X, BlockInputs())
    np.testing.assert_allclose(y[:, 0], alone[:, 0], rtol=1e-5, atol=1e-5)
    for other in (y[:, 1:], X[:, 1:]):
        assert np.abs(other - alone[:, 1:]).min(axis=(0, 1)).max() > 1e-3


def test_without_a_memory_the_sublayers_that_cross_are_not_there():
    params = random_params(CFG, (CROSSING,))
    alone = {
        "layers": {
            "block_0": {
                n: v for n, v in params["layers"]["block_0"].items() if not n.startswith("cross")
            }
        }
    }
    expected = run(CFG, (PLAIN,), NOT_FUSED, alone, X, BlockInputs())
    np.testing.assert_array_equal(
        run(CFG, (CROSSING,), NOT_FUSED, params, X, BlockInputs()), expected
    )


def test_a_token_that_reads_no_image_gets_nothing_from_crossing():
    blocks = (("cross", "cross_mlp"),)
    params = random_params(CFG, blocks)
    mask = np.array([[1, 0, 1], [0, 0, 1]], bool)
    context = BlockInputs(
        memory=MEMORY,
        memory_mask=np.broadcast_to(mask[:, None, :, None], (2, 1, 3, 5)),
        has_image=mask,
    )
    y = np.asarray(run(CFG, blocks, NOT_FUSED, params, X, context))
    np.testing.assert_array_equal(y[~mask], X[~mask])
    assert (np.abs(y - X)[mask].max(-1) > 1e-3).all()


REMAT = replace(CFG, depth=8)
REMAT_BLOCKS = (CROSSING,) * REMAT.depth
LONG_X, LONG_MEMORY = (RNG.normal(size=(8, n, 16)).astype(np.float32) for n in (64, 5))


@functools.cache
def loss_and_gradients(cfg):
    """`program(params)` -> loss, gradients: compiled once for all laws of remat."""
    context = BlockInputs(memory=jnp.asarray(LONG_MEMORY))

    def loss(params):
        return jnp.sum(jnp.sin(Stack(cfg, REMAT_BLOCKS).apply(params, LONG_X, context)[0]))

    params = {"params": random_params(cfg, REMAT_BLOCKS)}
    return jax.jit(jax.value_and_grad(loss)).lower(params).compile()


@pytest.mark.parametrize(
    ("remat", "unroll"), [("attention", 1), ("dots", 1), ("full", 1), ("full", 2)]
)
def test_remat_is_no_remat(remat, unroll):
    """The same parameters, loss and gradients."""
    again = replace(REMAT, remat=remat, unroll=unroll)
    params = {"params": random_params(REMAT, REMAT_BLOCKS)}
    shapes = jax.tree.map(jnp.shape, {"params": random_params(again, REMAT_BLOCKS)})
    assert shapes == jax.tree.map(jnp.shape, params)
    value, gradients = loss_and_gradients(again)(params)
    plain_value, plain = loss_and_gradients(REMAT)(params)
    np.testing.assert_allclose(value, plain_value, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), gradients, plain
    )


def test_remat_takes_less_memory_the_more_it_computes_again():
    def temporary_bytes(remat):
        program = loss_and_gradients(replace(REMAT, remat=remat))
        return program.memory_analysis().temp_size_in_bytes

    none, attention, dots, full = map(temporary_bytes, ("none", "attention", "dots", "full"))
    assert full < 0.5 * dots < 0.5 * attention < 0.5 * none
