"""Experiments, states and gradients that the tests of a training step share."""

import functools
from dataclasses import replace

import jax
import numpy as np

from vlm_jax import axes, sharding
from vlm_jax.config import Mesh, Optim
from vlm_jax.testing import random_batch, random_params, tiny, variants_and_tiles
from vlm_jax.train import optim
from vlm_jax.train.step import abstract_state, loss_and_gradients

CONFIGS = variants_and_tiles() | {"text_only": tiny("text_only")}
ONE, EIGHT = (1, 1, 1), (2, 2, 2)
ROWS = 16


def experiment(name: str):
    """A tiny experiment without biases of keys and of their norms, with gates if it can have any.

    The true gradient of those biases is 0, and Adam makes steps of its rounding error.
    """
    cfg = replace(CONFIGS[name], optim=Optim(warmup_steps=0))
    cfg = replace(cfg, fusion=replace(cfg.fusion, gated=cfg.fusion.has_cross_blocks, qk_norm=False))
    vision, decoder = replace(cfg.vision, qkv_bias=False), replace(cfg.decoder, qkv_bias=False)
    return replace(cfg, vision=vision, decoder=decoder)


def mesh_of(shape):
    count = int(np.prod(shape))
    return axes.make_mesh(Mesh(*shape), jax.devices()[:count])


def random_state(cfg, mesh):
    """Random parameters with open gates, laid out on the mesh; the rest as in a new state."""
    like = abstract_state(cfg, mesh)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    state = state.replace(params=random_params(cfg))
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), state, like)


def uneven_batch(cfg, seed=0):
    """A batch whose rows have very different numbers of scored tokens, one of them none."""
    batch = random_batch(cfg, ROWS, seed)
    is_kept = np.random.default_rng(0).uniform(size=batch.loss_weights.shape)
    is_kept = np.linspace(0, 1, ROWS)[:, None] > is_kept
    batch = batch.replace(loss_weights=batch.loss_weights * is_kept)
    return batch if cfg.fusion.has_images else batch.replace(images=None)


def gradients_of(cfg, shape=ONE):
    """Loss and gradients by path, computed on a mesh of this shape."""
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        batch = jax.device_put(uneven_batch(cfg), sharding.row_sharding(mesh))
        trained, frozen = optim.split(random_state(cfg, mesh).params, cfg.optim)
        function = jax.jit(functools.partial(loss_and_gradients, cfg))
        (loss, _), gradients = jax.device_get(function(trained, frozen, batch))
        return loss, gradients


@functools.cache
def plain_gradients(name):
    """Loss and gradients on one device, without anything that saves memory."""
    return gradients_of(experiment(name))


def assert_same_gradients(actual, expected):
    (loss, gradients), (expected_loss, expected_gradients) = actual, expected
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for path, gradient in expected_gradients.items():
        message = "/".join(path)
        np.testing.assert_allclose(gradients[path], gradient, rtol=1e-3, atol=1e-6, err_msg=message)
