"""One optimizer step: 1 device = 8 devices on every mesh shape; shardings follow the axes."""

import functools
import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.train.steps import (
    CONFIGS,
    EIGHT,
    ONE,
    assert_same_gradients,
    experiment,
    gradients_of,
    mesh_of,
    plain_gradients,
    random_state,
    uneven_batch,
)
from vlm_jax import sharding
from vlm_jax.config import factorizations
from vlm_jax.nn.vlm import VLM
from vlm_jax.testing import random_batch
from vlm_jax.train.inputs import seconds_at_peak
from vlm_jax.train.step import abstract_state, init_sharded_state, jit_train_step

MESHES = factorizations(8)  # 8 does not divide the 4 heads: they are kept whole


CORNERS = ((8, 1, 1), (1, 8, 1), (1, 1, 8), EIGHT)


def pairs():
    """The corners with one model; slow: all others.

    `test_memory` has every fusion style on 2 x 2 x 2, there with all that saves memory.
    """
    for shape, name in itertools.product(MESHES, CONFIGS):
        daily = shape in CORNERS and name == "unified"
        marks = () if daily else pytest.mark.slow
        yield pytest.param(name, shape, id=f"{name}-{shape}", marks=marks)


@pytest.mark.parametrize("name, shape", list(pairs()))
def test_eight_devices_compute_the_gradients_of_one(name, shape):
    assert_same_gradients(gradients_of(experiment(name), shape), plain_gradients(name))


def three_steps(cfg, shape):
    mesh, rows = mesh_of(shape), []
    with jax.set_mesh(mesh):
        state, step = random_state(cfg, mesh), jit_train_step(cfg, mesh)
        for seed in range(3):
            batch = jax.device_put(uneven_batch(cfg, seed), sharding.row_sharding(mesh))
            state, metrics = step(state, batch)
            rows.append([float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")])
    return rows, jax.device_get(traverse_util.flatten_dict(state.params))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_eight_devices_take_the_steps_of_one(kind):
    """Metrics and parameters of three steps; the last two depend on the optimizer's state."""
    cfg = experiment("unified")
    cfg = replace(cfg, optim=replace(cfg.optim, kind=kind))
    rows, params = three_steps(cfg, EIGHT)
    expected_rows, expected = three_steps(cfg, ONE)
    np.testing.assert_allclose(rows, expected_rows, rtol=2e-4)
    for path, value in params.items():
        # Adam divides by the gradient's size, which magnifies the rounding of small ones.
        np.testing.assert_allclose(value, expected[path], atol=2e-4, err_msg="/".join(path))


def test_parameters_that_are_loaded_are_never_made(monkeypatch):
    """Not even for a moment: a model may fill the memory."""
    cfg, mesh, out_shardings = experiment("unified"), mesh_of((1, 4, 2)), []
    params = traverse_util.flatten_dict(random_state(cfg, mesh).params, sep="/")
    loaded = {path: x for path, x in params.items() if path.startswith("decoder/")}
    jit = jax.jit

    def spy(function, **how):
        out_shardings.append(how.get("out_shardings"))
        return jit(function, **how)

    monkeypatch.setattr(jax, "jit", spy)
    state = init_sharded_state(cfg, mesh, loaded)
    (shardings,) = [shardings for shardings in out_shardings if shardings is not None]
    assert {path.split("/")[0] for path in shardings.params} == {"vision", "projector"}
    flat = traverse_util.flatten_dict(state.params, sep="/")
    assert flat.keys() == params.keys()
    assert all(flat[path] is x for path, x in loaded.items())


def test_a_new_run_traces_the_initialization_once(monkeypatch):
    """FLOPs, shardings and parameters ask for it: it is a good part of a second start."""
    cfg, mesh, traced = replace(experiment("unified"), seed=7), mesh_of((1, 1, 1)), []
    init = VLM.init
    monkeypatch.setattr(VLM, "init", lambda *args: traced.append(args) or init(*args))
    seconds_at_peak(cfg, mesh)
    with jax.set_mesh(mesh):
        init_sharded_state(cfg, mesh, {})
    assert len(traced) == 1


@functools.cache
def new_run():
    """A new state on 2 x 2 x 2 and the state after a step, with what they are asked about."""
    cfg, mesh = experiment("cross_attention"), mesh_of((2, 2, 2))
    with jax.set_mesh(mesh):
        before = init_sharded_state(cfg, mesh, {})
        shapes = [shard_shapes(before)]
        described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), before)
        after, metrics = jit_train_step(cfg, mesh)(before, random_batch(cfg, rows=8))
    return before, after, metrics, [*shapes, shard_shapes(after)], described


def test_a_new_model_knows_nothing():
    _, after, metrics, _, _ = new_run()
    assert float(metrics["loss"]) == pytest.approx(np.log(300), rel=0.05)
    assert int(after.step) == 1


def test_the_state_is_donated():
    before = new_run()[0]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.optimizer)))


SHARDS = {  # on 2 x 2 x 2: width over fsdp, heads, MLP and vocabulary over tensor
    "vision/patch_embed/projection/kernel": ((192, 32), (192, 16)),
    "vision/blocks/layers/block_0/mlp/up/kernel": ((2, 32, 64), (2, 16, 32)),
    "vision/blocks/layers/block_0/self/query/kernel": ((2, 32, 4, 8), (2, 16, 2, 8)),
    "projector/linear/kernel": ((32, 32), (16, 32)),
    "decoder/embedding/table": ((300, 32), (150, 16)),
    "decoder/blocks/layers/block_0/self/key/kernel": ((2, 32, 2, 8), (2, 16, 1, 8)),
    "decoder/blocks/layers/block_0/cross/out/kernel": ((2, 4, 8, 32), (2, 2, 8, 16)),
    "decoder/blocks/layers/block_0/cross_gate": ((2, 1), (2, 1)),
}


def shard_shapes(state):
    """Parameters and both moments: path -> (shape, shape on one device)."""
    adam = state.optimizer[1]
    trees = (traverse_util.flatten_dict(state.params), adam.mu, adam.nu)
    return [
        {"/".join(p): (x.shape, x.addressable_shards[0].data.shape) for p, x in tree.items()}
        for tree in trees
    ]


@pytest.mark.parametrize("moment", [0, 1], ids=["new", "after a step"])
def test_every_part_and_its_moments_are_sharded(moment):
    for shapes in new_run()[3][moment]:
        assert {name: shapes[name] for name in SHARDS} == SHARDS


def test_a_dimension_that_the_axis_does_not_divide_is_kept_whole():
    cfg = experiment("unified")
    shapes = shard_shapes(random_state(cfg, mesh_of((1, 1, 8))))[0]
    assert shapes["decoder/blocks/layers/block_0/self/query/kernel"][1] == (2, 32, 4, 8)
    assert shapes["decoder/embedding/table"][1] == (300, 32)
    assert shapes["decoder/blocks/layers/block_0/mlp/up/kernel"][1] == (2, 32, 8)


def test_the_abstract_state_is_the_state_without_its_numbers():
    like = abstract_state(experiment("cross_attention"), mesh_of((2, 2, 2)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), like) == new_run()[4]
