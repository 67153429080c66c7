"""Projectors: how many tokens come out, and which of the image's tokens each is made of."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.linen import meta

from vlm_jax.config import PROJECTORS, Decoder, Projector, Vision
from vlm_jax.nn.projector import build_projector
from vlm_jax.testing import tiny

RNG = np.random.default_rng(0)
KINDS = ("linear", "mlp", "pixel_shuffle", "average_pool", "resampler", "qformer")


def experiment(projector, width=8, **vision):
    """A grid of 4 x 4 tokens of width 8."""
    return tiny(
        projector=Projector(kind=projector, queries=3, heads=2, depth=1),
        vision=Vision(image_size_px=16, patch_size_px=4, width=8, **vision),
        decoder=Decoder(width=width),
    )


def random_params(cfg, x):
    shapes = meta.unbox(jax.eval_shape(build_projector(cfg.model).init, jax.random.key(0), x))[
        "params"
    ]
    return jax.tree.map(lambda s: jnp.asarray(RNG.normal(0, 0.5, s.shape), jnp.float32), shapes)


@functools.partial(jax.jit, static_argnums=0)
def project(cfg, params, x):
    return build_projector(cfg.model).apply({"params": params}, x)


def identity(width):
    return {"linear": {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}}


@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_row_names_a_class(kind):
    assert isinstance(build_projector(experiment(kind).model), nn.Module)


KEPT = {"class_token": True, "keep_class_token": True}
COUNTED = [
    (kind, vision) for kind in KINDS for vision in ({}, {"kind": "none"}, {"class_token": True})
]
COUNTED += [
    (kind, KEPT) for kind in ("linear", "mlp", "resampler", "qformer")
]  # the others need a grid


@pytest.mark.parametrize("kind, vision", COUNTED)
def test_the_config_counts_the_tokens_that_come_out(kind, vision):
    cfg = experiment(kind, width=24, **vision)
    x = jax.ShapeDtypeStruct(
        (2, 16 + cfg.vision.extra_tokens, cfg.vision.output_width), jnp.float32
    )
    y, _ = jax.eval_shape(
        lambda x: build_projector(cfg.model).init_with_output(jax.random.key(0), x), x
    )
    assert y.shape == (2, cfg.projector.num_tokens(cfg.vision), 24)


# The 4 x 4 tokens of a grid by number, and the four squares of 2 x 2, row by row.
SQUARES = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
NUMBERED = jnp.arange(16.0).reshape(1, 16, 1)


def test_pixel_shuffle_lines_up_the_tokens_of_each_square():
    cfg = experiment("pixel_shuffle", width=4)
    assert project(cfg, identity(4), NUMBERED)[0].tolist() == SQUARES


def test_average_pool_is_the_mean_of_each_square():
    cfg = experiment("average_pool", width=1)
    assert project(cfg, identity(1), NUMBERED)[0].tolist() == [
        [np.mean(square)] for square in SQUARES
    ]


def test_a_square_is_as_large_as_the_factor():
    cfg = experiment("average_pool", width=1)
    cfg = replace(cfg, projector=replace(cfg.projector, factor=4))
    assert project(cfg, identity(1), NUMBERED)[0].tolist() == [[7.5]]


@pytest.mark.parametrize("kind, width", [("pixel_shuffle", 32), ("average_pool", 8)])
def test_merged_tokens_are_normalized_before_their_projection(kind, width):
    """Gemma 3: RMSNorm of the averages, whose weights are stored less 1, and no bias."""
    cfg = experiment(kind, width=width)
    x = jnp.asarray(RNG.normal(size=(2, 16, 8)), jnp.float32)
    merged = project(cfg, identity(width), x)
    norm = {"norm": "rmsnorm_zero_centered", "norm_eps": 0.1, "bias": False}
    cfg = replace(cfg, projector=replace(cfg.projector, **norm))
    params = random_params(cfg, x)
    assert set(params["linear"]) == {"kernel"}
    rms = jnp.sqrt(jnp.square(merged).mean(-1, keepdims=True) + 0.1)
    expected = merged / rms * (1 + params["norm"]["scale"]) @ params["linear"]["kernel"]
    np.testing.assert_allclose(project(cfg, params, x), expected, rtol=1e-4, atol=1e-5)


def test_linear_is_one_product_a_token():
    cfg, x = experiment("linear", width=4), jnp.asarray(RNG.normal(size=(2, 16, 8)), jnp.float32)
    params = random_params(cfg, x)
    expected = x @ params["linear"]["kernel"] + params["linear"]["bias"]
    np.testing.assert_allclose(project(cfg, params, x), expected, rtol=1e-5, atol=1e-5)


def test_mlp_is_two_products_with_an_activation_between():
    cfg, x = experiment("mlp", width=4), jnp.asarray(RNG.normal(size=(2, 16, 8)), jnp.float32)
    params = random_params(cfg, x)
    one, two = params["linear_1"], params["linear_2"]
    hidden = jax.nn.gelu(x @ one["kernel"] + one["bias"], approximate=False)
    np.testing.assert_allclose(
        project(cfg, params, x), hidden @ two["kernel"] + two["bias"], rtol=1e-4, atol=1e-5
    )


def test_the_resampler_reads_a_set_of_tokens_of_any_order_and_number():
    cfg, x = experiment("resampler", width=8), jnp.asarray(RNG.normal(size=(2, 16, 8)), jnp.float32)
    params = random_params(cfg, x)
    y = project(cfg, params, x)
    np.testing.assert_allclose(project(cfg, params, x[:, ::-1]), y, atol=1e-4)
    assert project(cfg, params, x[:, :5]).shape == y.shape == (2, 3, 8)


def test_every_token_of_the_resampler_reads_every_patch():
    cfg, x = experiment("resampler", width=8), jnp.asarray(RNG.normal(size=(1, 16, 8)), jnp.float32)
    params = random_params(cfg, x)
    batch = jnp.concatenate([x, *(x.at[:, i].multiply(-1) for i in range(16))])
    changes = np.abs(project(cfg, params, batch) - project(cfg, params, x)).max(-1)[1:]
    assert (changes > 1e-4).all()


def test_the_tokens_of_the_resampler_differ():
    cfg, x = experiment("resampler", width=8), jnp.asarray(RNG.normal(size=(1, 16, 8)), jnp.float32)
    y = project(cfg, random_params(cfg, x), x)[0]
    assert min(np.abs(y[i] - y[j]).max() for i in range(3) for j in range(i)) > 1e-2


def test_the_q_former_is_the_blocks_of_bert_with_cross_attention_in_every_kth():
    cfg, x = experiment("qformer", width=24), jnp.asarray(RNG.normal(size=(2, 16, 8)), jnp.float32)
    small = {"width": 6, "block_mlp_width": 10, "depth": 3, "cross_every": 2}
    cfg = replace(cfg, projector=replace(cfg.projector, **small))
    params = random_params(cfg, x)
    assert [f"block_{i}" for i in range(3) if "cross" in params[f"block_{i}"]] == [
        "block_0",
        "block_2",
    ]
    assert params["block_1"]["mlp"]["up"]["kernel"].shape == (6, 10)
    y = project(cfg, params, x)
    assert y.shape == (2, 3, 24)
    np.testing.assert_allclose(project(cfg, params, x[:, ::-1]), y, atol=1e-4)
    assert np.abs(project(cfg, params, x.at[:, 5].multiply(-1)) - y).max() > 1e-3
