"""Attention against a reference that shares no line with it."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from tests.nn.programs import equations
from vlm_jax.config import Decoder, PatchRope, Rope, Vision
from vlm_jax.nn.attention import Attention, apply_rope, dot_product_attention
from vlm_jax.nn.positions import patch_coordinates, patch_rope_tables, rope_tables

RNG = np.random.default_rng(0)
CFG = Decoder(width=16, heads=4)


def random(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def random_params(cfg):
    x = jnp.zeros((1, 1, cfg.width))
    shapes = meta.unbox(jax.eval_shape(Attention(cfg).init, jax.random.key(0), x, x))["params"]
    return jax.tree.map(lambda s: random(*s.shape), shapes)


@functools.partial(jax.jit, static_argnums=0)
def attention(cfg, params, x, source, mask=None, rope=None, cache=None, index=None):
    return Attention(cfg).apply({"params": params}, x, source, mask, rope, cache, index)


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol)


def reference(q, k, v, mask):
    """One query and one head at a time."""
    rows, length, heads, width = q.shape
    groups = heads // k.shape[2]
    seen = np.broadcast_to(True if mask is None else mask, (rows, 1, length, k.shape[1]))
    out = np.zeros(q.shape)
    for b, s, n in np.ndindex(rows, length, heads):
        scores = k[b, :, n // groups] @ q[b, s, n] / np.sqrt(width)
        scores = np.where(seen[b, 0, s], scores, -np.inf)
        weights = np.exp(scores - scores.max())
        out[b, s, n] = weights / weights.sum() @ v[b, :, n // groups]
    return out


def heads_first(x):
    """(B, T, K, H) -> (B, K, T, H), as keys and values are kept."""
    return jnp.swapaxes(x, 1, 2)


def masks(rows, queries, keys):
    some = RNG.random((rows, 1, queries, keys)) < 0.5
    some[..., 0] = True
    return {
        "none": None,
        "every row its own": jnp.asarray(some),
        "one for all": jnp.asarray(some[:1]),
    }


@pytest.mark.parametrize("mask", masks(2, 3, 5))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_softmax_attention_query_by_query(kv_heads, mask):
    q, k, v = random(2, 3, 4, 8), random(2, 5, kv_heads, 8), random(2, 5, kv_heads, 8)
    mask = masks(2, 3, 5)[mask]
    close(
        dot_product_attention(q, heads_first(k), heads_first(v), mask),
        reference(*map(np.asarray, (q, k, v)), mask),
    )


def test_the_softmax_is_in_float32_whatever_is_computed():
    x = random(2, 3, 4, 8).astype(jnp.bfloat16)
    program = jax.make_jaxpr(dot_product_attention)(x, heads_first(x), heads_first(x), None)
    kinds = {
        of.invars[0].aval.dtype.name
        for _, of in equations(program.jaxpr)
        if of.primitive.name == "exp"
    }
    assert kinds == {"float32"}
    assert program.out_avals[0].dtype == jnp.bfloat16


@functools.partial(jax.jit, static_argnums=0)
def output_and_gradients(function, q, k, v, mask, dy):
    y, backward = jax.vjp(lambda q, k, v: function(q, k, v, mask=mask), q, k, v)
    return y, *backward(dy)


@pytest.mark.parametrize("mask", masks(2, 3, 5))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_has_the_gradients_of_dot_product_attention(kv_heads, mask):
    q, k, v, dy = (
        random(2, 3, 4, 8),
        random(2, 5, kv_heads, 8),
        random(2, 5, kv_heads, 8),
        random(2, 3, 4, 8),
    )
    mask = masks(2, 3, 5)[mask]
    expected = output_and_gradients(jax.nn.dot_product_attention, q, k, v, mask, dy)
    y, *gradients = output_and_gradients(
        dot_product_attention, q, heads_first(k), heads_first(v), mask, dy
    )
    dq, dk, dv = gradients
    for actual, reference_value in zip((y, dq, heads_first(dk), heads_first(dv)), expected):
        close(actual, reference_value)


def test_a_query_without_visible_keys_has_finite_output_and_gradients():
    q, mask = random(1, 2, 1, 4), jnp.zeros((1, 1, 2, 2), bool)
    value, gradient = jax.value_and_grad(
        lambda q: dot_product_attention(q, heads_first(q), heads_first(q), mask).sum()
    )(q)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_cross_attention_with_x1_equal_to_x2_is_self_attention():
    """The module of self-attention, written out: one sequence makes queries, keys and values."""
    params, x1 = random_params(CFG), random(2, 5, 16)
    x2 = jnp.array(x1)

    def project(name):
        return np.asarray(
            jnp.einsum("bsd,dnh->bsnh", x1, params[name]["kernel"]) + params[name]["bias"]
        )

    mixed = reference(*map(project, ("query", "key", "value")), None)
    self_attention = (
        jnp.einsum("bsnh,nhd->bsd", mixed, params["out"]["kernel"]) + params["out"]["bias"]
    )
    close(attention(CFG, params, x1, x2)[0], self_attention, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_the_two_sequences_may_differ_in_length(kv_heads):
    cfg = replace(CFG, kv_heads=kv_heads)
    x1, x2 = random(2, 3, 16), random(2, 7, 16)
    y, (k, v) = attention(cfg, random_params(cfg), x1, x2)
    assert y.shape == x1.shape
    assert k.shape == v.shape == (2, cfg.num_kv_heads, 7, 4)


def test_queries_come_from_x_and_keys_and_values_from_kv_input():
    params, x, source = random_params(CFG), random(1, 3, 16), random(1, 1, 16)
    y, _ = attention(CFG, params, x, source)
    close(y, jnp.broadcast_to(y[:, :1], y.shape))  # a single key: every query gets its value
    assert np.abs(attention(CFG, params, x, -source)[0] - y).max() > 1e-3


def test_heads_of_any_width():
    cfg = replace(CFG, head_dim=6)
    params = random_params(cfg)
    assert params["query"]["kernel"].shape == (16, 4, 6)
    assert attention(cfg, params, random(1, 2, 16), random(1, 2, 16))[0].shape == (1, 2, 16)


def test_biases_exist_only_if_configured():
    params = random_params(replace(CFG, qkv_bias=False, out_bias=True))
    assert {name for name in params if "bias" in params[name]} == {"out"}
    params = random_params(replace(CFG, qkv_bias=True, out_bias=False))
    assert {name for name in params if "bias" in params[name]} == {"query", "key", "value"}
    params = random_params(replace(CFG, key_bias=False, out_bias=False))
    assert {name for name in params if "bias" in params[name]} == {"query", "value"}


def causal(queries, keys, first=0):
    return jnp.asarray(first + np.arange(queries)[:, None] >= np.arange(keys))[None, None]


def test_tokens_one_by_one_through_a_cache_are_all_at_once():
    cfg, x = replace(CFG, kv_heads=2), random(2, 5, 16)
    params, positions = random_params(cfg), jnp.tile(jnp.arange(5), (2, 1))
    whole, _ = attention(cfg, params, x, x, causal(5, 5), rope_tables(positions, cfg))
    cache, steps = (jnp.zeros((2, 2, 8, 4)),) * 2, []
    for i in range(5):
        rope = rope_tables(positions[:, i : i + 1], cfg)
        token = x[:, i : i + 1]
        y, cache = attention(
            cfg, params, token, token, causal(1, 8, first=i), rope, cache, jnp.int32(i)
        )
        steps.append(y)
    close(jnp.concatenate(steps, axis=1), whole)


def test_cached_keys_and_values_are_used_unchanged():
    params, x, source = random_params(CFG), random(2, 3, 16), random(2, 4, 16)
    y, cache = attention(CFG, params, x, source)
    again, same = attention(CFG, params, x, None, None, None, cache)
    close(again, y)
    for new, old in zip(same, cache):
        np.testing.assert_array_equal(new, old)


@functools.partial(jax.jit, static_argnums=0)
def attention_with_rope(cfg, positions, length=6):
    """Self-attention of one head over fixed numbers at the given positions."""
    numbers = np.random.default_rng(1)
    q, k, v = jnp.asarray(numbers.normal(size=(3, 1, length, 1, 8)), jnp.float32)
    rope = rope_tables(positions[None], cfg)
    return dot_product_attention(
        apply_rope(q, rope), heads_first(apply_rope(k, rope)), heads_first(v), None
    )


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rope_is_relative(fraction):
    cfg = Decoder(width=8, heads=1, rope=Rope(fraction=fraction))
    positions = np.array([0, 1, 2, 5, 9, 10])
    y = attention_with_rope(cfg, positions)
    close(attention_with_rope(cfg, positions + 37), y, atol=1e-4)
    assert np.abs(attention_with_rope(cfg, positions * 2) - y).max() > 1e-2


def test_rope_rotates_pairs_of_the_two_halves():
    """Su et al. 2021, eq. 34, as complex numbers."""
    cfg, x, position = Decoder(width=8, heads=1, rope=Rope(theta=100.0)), random(1, 1, 1, 8), 3
    pairs = np.asarray(x[..., :4] + 1j * x[..., 4:])
    rotated = pairs * np.exp(1j * position * 100.0 ** (-np.arange(4) / 4))
    expected = np.concatenate([rotated.real, rotated.imag], axis=-1)
    close(apply_rope(x, rope_tables(jnp.asarray([[position]]), cfg)), expected)


def test_rope_keeps_lengths_and_leaves_position_zero():
    cfg, x = Decoder(width=8, heads=1), random(1, 3, 1, 8)
    y = apply_rope(x, rope_tables(jnp.asarray([[0, 4, 11]]), cfg))
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    close(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1))


def test_a_fraction_of_rope_passes_the_rest_through():
    x, positions = random(1, 2, 3, 8), jnp.asarray([[4, 9]])
    y = apply_rope(x, rope_tables(positions, Decoder(width=24, heads=3, rope=Rope(fraction=0.5))))
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    assert (np.abs(y - x)[..., :4] > 1e-6).all()
    close(y[..., :4], apply_rope(x[..., :4], rope_tables(positions, Decoder(width=12, heads=3))))


def patch_scores(cfg, coordinates, q, k):
    rope = patch_rope_tables(jnp.asarray(coordinates[None]), cfg)
    return np.einsum("bsnh,btnh->bnst", apply_rope(q, rope), apply_rope(k, rope))


@pytest.mark.parametrize("kind", ["same", "alternate"])
def test_scores_of_patches_depend_on_the_distance_in_rows_and_in_columns(kind):
    cfg = Vision(width=8, heads=1, rope=PatchRope(kind, theta=100.0))
    places = np.float32([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])
    q, k = random(1, 6, 1, 8), random(1, 6, 1, 8)
    scores = patch_scores(cfg, places, q, k)
    close(patch_scores(cfg, places + np.float32([5, -3]), q, k), scores, atol=1e-4)
    for stretched in ((2, 1), (1, 2)):
        assert np.abs(patch_scores(cfg, places * stretched, q, k) - scores).max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "exponents"), [("same", (0, 1 / 2, 0, 1 / 2)), ("alternate", (0, 1 / 2, 1 / 4, 3 / 4))]
)
def test_patches_are_rotated_by_row_then_by_column(kind, exponents):
    """As complex numbers: two frequencies for the row 3, then two for the column 5."""
    cfg, x = Vision(width=8, heads=1, rope=PatchRope(kind, theta=100.0)), random(1, 1, 1, 8)
    angles = np.array([3, 3, 5, 5]) * 100.0 ** -np.array(exponents)
    rotated = np.asarray(x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    expected = np.concatenate([rotated.real, rotated.imag], axis=-1)
    close(apply_rope(x, patch_rope_tables(jnp.asarray([[[3.0, 5.0]]]), cfg)), expected)


def test_centered_coordinates_do_not_depend_on_the_size_of_the_grid():
    rope = PatchRope("same", coordinates="centered")
    small = patch_coordinates(np.array([[0, 0], [1, 0]]), np.array([2, 1]), rope)
    large = patch_coordinates(np.array([[1, 1], [4, 1]]), np.array([6, 3]), rope)
    close(small, [[-np.pi, 0], [np.pi, 0]])
    close(large, small)
