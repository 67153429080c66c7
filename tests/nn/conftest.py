"""Random parameters, and one jitted forward pass for all tests of this folder."""

import functools
import zlib

import jax
import numpy as np
import pytest
from flax import traverse_util
from flax.linen import meta

from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.vlm import VLM


@functools.cache
def make_params(cfg, seed=0):
    """Random everywhere, where `init` has zeros and ones: an ignored bias or gate would show."""

    def numbers(path, shape):
        rng = np.random.default_rng((seed, zlib.crc32("/".join(path).encode())))
        around = 1.0 if path[-1].endswith(("scale", "gate")) else 0.0
        return rng.normal(around, 0.2, shape.shape).astype(np.float32)

    return traverse_util.path_aware_map(numbers, meta.unbox(abstract_params(cfg)))


@functools.partial(jax.jit, static_argnums=0)
def jitted_forward(cfg, params, batch, cache=None):
    return VLM(cfg.model).apply({"params": params}, batch, cache)


@pytest.fixture(scope="session")
def random_params():
    """`random_params(cfg)`: a tree of random numbers, equal for equal paths and shapes."""
    return make_params


@pytest.fixture(scope="session")
def forward():
    """`forward(cfg, params, batch, cache)` -> Output, compiled once for a config and shapes.

    Logits are NumPy's, because operations of JAX outside of a program are compiled one by one.
    Training rows and prompts have the same fields: the model does not read the targets.
    """

    def run(cfg, params, batch, cache=None):
        batch = batch.replace(targets=None, loss_weights=None)
        output = jitted_forward(cfg, params, batch, cache)
        return output.replace(logits=np.asarray(output.logits))

    run.compiled_programs = jitted_forward._cache_size
    return run
