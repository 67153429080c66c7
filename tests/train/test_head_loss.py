"""The loss in chunks is the plain one, its gradients too, and never holds all logits."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from vlm_jax import axes, sharding
from vlm_jax.config import Mesh
from vlm_jax.testing import random_batch, random_params, tiny
from vlm_jax.train.loss import chunk_tokens, cross_entropy, head_cross_entropy
from vlm_jax.train.step import output_head

ROWS, LENGTH = 8, 28
SOURCES = 3  # of a mixture
RNG = np.random.default_rng(0)
WEIGHTS = {
    "none": np.zeros((ROWS, LENGTH)),
    "all": np.ones((ROWS, LENGTH)),
    "one row": np.eye(ROWS)[3][:, None] * np.ones(LENGTH),
    "one token": np.eye(ROWS * LENGTH)[-1].reshape(ROWS, LENGTH),
    "some, weighted": RNG.choice([0, 0.5, 1, 2], (ROWS, LENGTH), p=[0.7, 0.1, 0.1, 0.1]),
}


def experiment(tied=True, softcap=None):
    cfg = tiny()
    return replace(
        cfg, decoder=replace(cfg.decoder, tie_word_embeddings=tied, logit_softcap=softcap)
    )


def inputs(cfg, weights, dtype=np.float32):
    batch = random_batch(cfg, ROWS).replace(loss_weights=np.float32(weights))
    hidden = np.random.default_rng(1).normal(0, 2, (ROWS, LENGTH, cfg.decoder.width)).astype(dtype)
    params = traverse_util.flatten_dict(random_params(cfg))
    return {path: params[path] for path in output_head(cfg).letters}, hidden, batch


@functools.partial(jax.jit, static_argnums=(0, 1))
def chunked(cfg, chunk, params, hidden, batch):
    """Value and gradients of the head and the hidden numbers."""

    def loss(params, hidden):
        nats = head_cross_entropy(output_head(cfg), params, {}, hidden, batch, chunk, SOURCES)
        return 3 * nats.total, nats.by_source

    (value, by_source), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        params, hidden
    )
    return (value, gradients) if by_source is None else (value, gradients, by_source)


@functools.partial(jax.jit, static_argnums=(0, 1))
def chunked_value(cfg, chunk, params, hidden, batch):
    """The value alone, without the gradients that `chunked` makes on the way."""
    return 3 * head_cross_entropy(output_head(cfg), params, {}, hidden, batch, chunk).total


@functools.partial(jax.jit, static_argnums=0)
def plain(cfg, params, hidden, batch):
    def loss(params, hidden):
        return 3 * cross_entropy(output_head(cfg).logits(params, hidden), batch)[0]

    return jax.value_and_grad(loss, argnums=(0, 1))(params, hidden)


def assert_equal(found, expected, rtol=1e-4):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.float32(x), np.float32(y), rtol=rtol, atol=rtol * (np.abs(y).max() + 1e-9)
        )


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("chunk", [1000, 50])
def test_in_chunks_is_plain_whatever_is_scored(chunk, weights):
    cfg = experiment()
    args = inputs(cfg, weights)
    assert_equal(chunked(cfg, chunk, *args), plain(cfg, *args))
    assert_equal(chunked_value(cfg, chunk, *args), plain(cfg, *args)[0])


@pytest.mark.parametrize("chunk", [1000, 16])
def test_the_losses_of_the_sources_of_a_mixture_sum_to_the_whole(chunk):
    cfg = experiment()
    params, hidden, batch = inputs(cfg, WEIGHTS["some, weighted"])
    ids = np.random.default_rng(2).integers(0, SOURCES, (ROWS, LENGTH)).astype(np.int32)
    value, gradients, by_source = chunked(cfg, chunk, params, hidden, batch.replace(source_ids=ids))
    assert_equal((value, gradients), chunked(cfg, chunk, params, hidden, batch))
    for source in range(SOURCES):
        alone = batch.replace(loss_weights=batch.loss_weights * (ids == source))
        expected = chunked_value(cfg, chunk, params, hidden, alone) / 3
        assert_equal(by_source[source], expected)
    assert_equal(3 * by_source.sum(), value)


def test_what_does_not_fit_at_once_is_cut_into_chunks_that_few_scored_tokens_fill():
    assert chunk_tokens(2048, 8192) == 2048, "64 MiB of logits: no loop"
    assert chunk_tokens(2080, 8192) == 512
    assert chunk_tokens(2080, 128_256) == 130, "as many as fit"
    assert chunk_tokens(2048, 8192, chunk=7) == 7


@pytest.mark.parametrize("tied, softcap", [(True, 5.0), (False, None)])
def test_every_form_of_the_head(tied, softcap):
    cfg = experiment(tied, softcap)
    args = inputs(cfg, WEIGHTS["some, weighted"])
    assert_equal(chunked(cfg, 16, *args), plain(cfg, *args))


def test_narrow_hidden_numbers_have_logits_in_float32():
    cfg = experiment(tied=False)
    params, hidden, batch = inputs(cfg, WEIGHTS["some, weighted"], jnp.bfloat16)
    value, (_, d_hidden) = chunked(cfg, 16, params, hidden, batch)
    expected, (_, d_expected) = plain(cfg, params, hidden.astype(np.float32), batch)
    assert value.dtype == jnp.float32 and d_hidden.dtype == jnp.bfloat16
    assert_equal(value, expected)
    assert_equal(d_hidden, d_expected, rtol=1e-2)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_on_eight_devices_rows_stay_where_they_are(shape):
    cfg, mesh = experiment(), axes.make_mesh(Mesh(*shape))
    params, hidden, batch = inputs(cfg, WEIGHTS["some, weighted"])
    with jax.set_mesh(mesh):
        hidden, batch = jax.device_put((hidden, batch), sharding.row_sharding(mesh))
        compiled = chunked.lower(cfg, 6, params, hidden, batch).compile()
        assert_equal(
            compiled(params, hidden, batch), plain(cfg, *inputs(cfg, WEIGHTS["some, weighted"]))
        )
    moved = [
        line
        for line in compiled.as_text().splitlines()
        if "all-to-all(" in line or "collective-permute(" in line
    ]
    gathered = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert not moved and not gathered


def temporary_bytes(function, *shapes) -> int:
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_the_logits_of_a_large_vocabulary_are_never_all_there(trained):
    """Forward and backward: memory for the head's gradient and a part of (B, S, V)."""
    vocabulary, rows, length = 128_256, 8, 512
    cfg = experiment()
    cfg = replace(cfg, decoder=replace(cfg.decoder, vocab_size=vocabulary))
    head, like = output_head(cfg), jax.ShapeDtypeStruct
    params = {path: like((vocabulary, 32), jnp.float32) for path in head.letters}
    hidden = like((rows, length, 32), jnp.float32)
    text = like((rows, length), jnp.int32)
    batch = jax.eval_shape(lambda: random_batch(tiny(), 1)).replace(
        targets=text, loss_weights=like((rows, length), jnp.float32)
    )

    def loss(params, hidden, batch):
        parts = (params, {}) if trained else ({}, params)
        return head_cross_entropy(head, *parts, hidden, batch).total

    whole = rows * length * vocabulary * 4
    assert temporary_bytes(loss, params, hidden, batch) < 0.2 * whole
    gradient = jax.grad(loss, argnums=(0, 1) if trained else 1)
    assert temporary_bytes(gradient, params, hidden, batch) < 0.2 * whole
