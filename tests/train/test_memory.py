"""Saving memory changes no result: microbatches, remat, chunks of the loss; bfloat16 is near."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from tests.train.steps import (
    EIGHT,
    assert_same_gradients,
    experiment,
    gradients_of,
    mesh_of,
    plain_gradients,
    random_state,
    uneven_batch,
)
from vlm_jax import sharding
from vlm_jax.config import LrMult, Optim, UserError
from vlm_jax.nn.parts import find_part
from vlm_jax.testing import random_batch, random_params
from vlm_jax.train import inputs, optim
from vlm_jax.train.step import (
    accumulate,
    init_state,
    jit_train_step,
    loss_and_gradients,
    state_shapes,
    state_shardings,
)

# Of the other variants, hybrid has the parts of `hybrid in tiles`, and encoder_free of unified.
STYLES = ("unified", "cross_attention", "encoder_decoder", "hybrid in tiles")


@pytest.mark.parametrize("name", STYLES)
def test_all_that_saves_memory_together_on_eight_devices_is_the_plain_step_on_one(name):
    """Four microbatches, chunks of the loss, and activations computed again."""
    cfg = experiment(name)
    vision, decoder = replace(cfg.vision, remat="full"), replace(cfg.decoder, remat="dots")
    train = replace(cfg.train, microbatches=4, loss_chunk=40)
    saving = replace(cfg, train=train, vision=vision, decoder=decoder)
    assert_same_gradients(gradients_of(saving, EIGHT), plain_gradients(name))


def test_four_microbatches_are_one():
    cfg = experiment("unified")
    cut = replace(cfg, train=replace(cfg.train, microbatches=4))
    assert_same_gradients(gradients_of(cut), plain_gradients("unified"))


def test_rows_stay_on_their_devices_when_a_batch_is_cut_into_microbatches():
    cfg, mesh = experiment("unified"), mesh_of((4, 2, 1))
    with jax.set_mesh(mesh):
        rows = sharding.row_sharding(mesh)
        batch = jax.device_put(random_batch(cfg, rows=32), rows)
        cut = jax.jit(
            lambda batch: accumulate(lambda part: jnp.sum(part.images**2), batch, 4),
            in_shardings=rows,
        )
        program = cut.lower(batch).compile().as_text()
    assert not any(
        word in program for word in ("all-to-all(", "collective-permute(", "all-gather(")
    )
    assert "all-reduce" in program


@functools.cache
def state_bytes(shape):
    """Bytes of each device of a mesh to make the state of a larger model."""
    cfg = experiment("unified")
    cfg = replace(cfg, decoder=replace(cfg.decoder, width=256, vocab_size=8192, mlp_width=1024))
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        make = jax.jit(lambda key: init_state(cfg, key), out_shardings=state_shardings(cfg, mesh))
        memory = make.lower(jax.random.key(0)).compile().memory_analysis()
    return memory.output_size_in_bytes + memory.temp_size_in_bytes


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 2, 4), (2, 2, 2)], ids=str)
def test_a_state_is_made_where_it_lies_and_whole_nowhere(shape):
    data, fsdp, tensor = shape
    assert state_bytes(shape) < 1.1 * state_bytes((8, 1, 1)) / (fsdp * tensor)


def test_microbatches_take_less_memory():
    def temporary_bytes(parts):
        cfg = experiment("unified")
        cfg = replace(cfg, train=replace(cfg.train, microbatches=parts))
        trained, frozen = optim.split(random_params(cfg), cfg.optim)
        program = jax.jit(functools.partial(loss_and_gradients, cfg))
        lowered = program.lower(trained, frozen, random_batch(cfg, rows=64))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < 0.4 * temporary_bytes(1)


@pytest.mark.parametrize(
    "batch_size, microbatches, message",
    [(8, 3, "8 .* train.microbatches 3"), (8, 4, "8 .* multiple of 16")],
)
def test_a_batch_that_cannot_be_cut_is_refused(batch_size, microbatches, message):
    cfg = experiment("unified")
    cfg = replace(cfg, train=replace(cfg.train, batch_size=batch_size, microbatches=microbatches))
    with pytest.raises(UserError, match=f"train.batch_size {message}"):
        inputs.check_rows(cfg, mesh_of((2, 2, 2)))


FROZEN = Optim(warmup_steps=0, lr_mult=LrMult(vision=0, decoder=0))


@pytest.mark.parametrize("name", STYLES)
def test_in_bfloat16_loss_and_gradients_are_near_and_arrive_in_float32(name):
    cfg = experiment(name)
    narrow = replace(cfg, train=replace(cfg.train, compute_dtype="bfloat16"))
    loss, gradients = gradients_of(narrow)
    expected_loss, expected = plain_gradients(name)
    assert loss == pytest.approx(expected_loss, rel=0.02)
    assert {x.dtype for x in gradients.values()} == {np.dtype("float32")}
    product = optax.tree.vdot(gradients, expected)
    assert product / optax.tree.norm(gradients) / optax.tree.norm(expected) > 0.98


def test_frozen_parts_are_kept_in_the_compute_dtype_and_stay_bit_for_bit():
    cfg, mesh = replace(experiment("cross_attention"), optim=FROZEN), mesh_of(EIGHT)
    cfg = replace(cfg, train=replace(cfg.train, compute_dtype="bfloat16"))
    with jax.set_mesh(mesh):
        before = jax.device_get(random_state(cfg, mesh))
        before = before.replace(
            params=jax.tree.map(
                lambda x, s: np.asarray(x, s.dtype), before.params, state_shapes(cfg).params
            )
        )
        after, _ = jit_train_step(cfg, mesh)(before, uneven_batch(cfg))
    new = traverse_util.flatten_dict(jax.device_get(after.params))
    for path, old in traverse_util.flatten_dict(before.params).items():
        frozen = find_part(path) in ("vision", "decoder")
        assert new[path].dtype == (jnp.bfloat16 if frozen else jnp.float32), path
        assert np.array_equal(new[path], old) == frozen, path
