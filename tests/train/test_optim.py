"""Trained parts and their learning rates, weight decay, clipping, and the optimizers."""

import dataclasses
import functools
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from vlm_jax.config import ConfigError, LrMult, Optim
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.parts import PARTS, find_part
from vlm_jax.structs import State
from vlm_jax.testing import (
    KINDS,
    hybrid_in_tiles,
    random_batch,
    random_params,
    tiny,
)
from vlm_jax.train import optim
from vlm_jax.train.step import init_state, train_step

GATED = tiny("cross_attention")  # has all four parts
RESAMPLER = tiny("cross_attention", projector=replace(GATED.projector, kind="resampler"))


def flat_params(cfg=GATED):
    return traverse_util.flatten_dict(random_params(cfg))


def optimizer(settings: Optim, cfg=GATED):
    """The optimizer of a run of 10 steps."""
    return optim.optimizer(replace(cfg, optim=settings, train=replace(cfg.train, steps=10)))


def filled(params, value):
    return {path: np.full(x.shape, value, np.float32) for path, x in params.items()}


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine():
    cfg = Optim(learning_rate=2.0, warmup_steps=10, final_lr_fraction=0.1)
    rate = optim.schedule(cfg, steps=110)
    points = {0: 0.0, 5: 1.0, 10: 2.0, 60: (2.0 + 0.2) / 2, 110: 0.2, 200: 0.2}
    np.testing.assert_allclose([rate(step) for step in points], list(points.values()), atol=1e-6)


def test_a_run_shorter_than_its_warm_up_still_learns():
    rate = optim.schedule(Optim(warmup_steps=100), steps=4)
    assert max(float(rate(step)) for step in range(4)) > 0
    assert np.isfinite(float(optim.schedule(Optim(warmup_steps=100), steps=1)(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_belongs_to_exactly_one_part(kind):
    parts = {find_part(path) for path in traverse_util.flatten_dict(random_params(tiny(kind)))}
    assert parts == set(PARTS) - ({"cross_attention"} if kind == "unified" else set())
    assert set(PARTS) == {field.name for field in dataclasses.fields(LrMult)}


def test_split_and_join_are_inverse():
    params = random_params(GATED)
    cfg = Optim(lr_mult=LrMult(vision=0, cross_attention=0))
    trained, frozen = optim.split(params, cfg)
    assert not set(trained) & set(frozen)
    assert {find_part(path) for path in frozen} == {"vision", "cross_attention"}
    joined = optim.join(trained, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, joined, params))


def test_only_matrices_decay():
    params = flat_params(RESAMPLER)
    transform = optimizer(Optim(learning_rate=1.0, warmup_steps=0, weight_decay=0.1), RESAMPLER)
    updates, _ = jax.jit(transform.update)(filled(params, 0), transform.init(params), params)
    decayed = {path for path, update in updates.items() if np.any(update)}
    assert decayed == {path for path in params if path[-1] in ("kernel", "table")}
    for path in decayed:
        np.testing.assert_allclose(updates[path], -0.1 * params[path], rtol=1e-5)


def test_a_part_learns_at_its_own_rate():
    params = flat_params()

    def updates(scale: LrMult):
        transform = optimizer(Optim(lr_mult=scale, warmup_steps=0))
        return jax.jit(transform.update)(filled(params, 0.1), transform.init(params), params)[0]

    ones, scaled = (
        updates(LrMult()),
        updates(LrMult(vision=0.5, projector=3, cross_attention=0.25)),
    )
    factors = {"vision": 0.5, "projector": 3, "cross_attention": 0.25, "decoder": 1}
    for path in params:
        assert np.any(ones[path])
        np.testing.assert_allclose(scaled[path], factors[find_part(path)] * ones[path], rtol=1e-5)


def test_gates_learn_at_their_own_rate():
    cfg = tiny("cross_attention", fusion=replace(GATED.fusion, gated=True))
    params = flat_params(cfg)

    def updates(settings: Optim):
        transform = optimizer(settings, cfg)
        return jax.jit(transform.update)(filled(params, 0.1), transform.init(params), params)[0]

    ones = updates(Optim(warmup_steps=0))
    scaled = updates(Optim(warmup_steps=0, gate_lr_mult=10.0, lr_mult=LrMult(cross_attention=0.5)))
    factors = {path: scaled[path] / ones[path] for path in params}
    gates = {path for path, factor in factors.items() if np.allclose(factor, 5.0)}
    assert gates == {path for path in params if path[-1] in ("cross_gate", "cross_mlp_gate")}
    assert len(gates) > 1
    assert {round(float(np.mean(factors[path])), 3) for path in set(params) - gates} == {0.5, 1.0}


@pytest.mark.parametrize("norm, clipped", [(100.0, 2.0), (0.5, 0.5)])
def test_the_gradient_is_clipped_to_a_global_norm(norm, clipped):
    params = flat_params()
    gradients = filled(params, norm / np.sqrt(sum(x.size for x in params.values())))
    transform = optimizer(Optim(clip_norm=2.0, beta1=0.9))
    _, state = jax.jit(transform.update)(gradients, transform.init(params), params)
    seen = optax.tree.get(state, "mu")  # 1 - beta1 of the first gradient
    np.testing.assert_allclose(optax.tree.norm(seen) / 0.1, clipped, rtol=1e-4)


def with_frozen(*parts, cfg=GATED):
    return replace(
        cfg, optim=Optim(warmup_steps=0, lr_mult=replace(LrMult(), **dict.fromkeys(parts, 0)))
    )


# Every part is frozen once and trained once.
@pytest.mark.parametrize(
    ("frozen", "cfg"),
    [(("vision", "cross_attention"), GATED), (("projector", "decoder"), hybrid_in_tiles())],
    ids=["cross_attention", "hybrid in tiles"],
)
def test_frozen_parts_stay_bit_for_bit_and_the_others_move(frozen, cfg):
    cfg = with_frozen(*frozen, cfg=cfg)
    params = random_params(cfg)
    trained, _ = optim.split(params, cfg.optim)
    state = State(jax.numpy.int32(0), params, optim.optimizer(cfg).init(trained))
    step, batch = jax.jit(lambda state, batch: train_step(cfg, state, batch)), random_batch(cfg)
    for _ in range(3):
        state, _ = step(state, batch)
    after = traverse_util.flatten_dict(state.params)
    for path, before in traverse_util.flatten_dict(params).items():
        same = np.array_equal(before, after[path])
        assert same == (find_part(path) in frozen), "/".join(path)


@pytest.mark.parametrize("part", PARTS)
def test_a_frozen_part_has_no_moments(part):
    cfg = with_frozen(part)
    state = jax.eval_shape(lambda: init_state(cfg, jax.random.key(0)))
    for moment in ("mu", "nu"):
        moments = set(optax.tree.get(state.optimizer, moment))
        assert moments == {path for path in flat_params() if find_part(path) != part}


def test_an_optimizer_is_one_function_and_one_row(monkeypatch):
    def lion(cfg, boxes):
        return optax.scale_by_lion(cfg.beta1, cfg.beta2)

    monkeypatch.setitem(optim.OPTIMIZERS, "lion", lion)
    cfg = replace(GATED, optim=Optim("lion", learning_rate=0.1, warmup_steps=0, weight_decay=0.0))
    optim.check_kind(cfg.optim)
    params = random_params(cfg)
    trained, _ = optim.split(params, cfg.optim)
    state = State(jax.numpy.int32(0), params, optim.optimizer(cfg).init(trained))
    state, _ = jax.jit(functools.partial(train_step, cfg))(state, random_batch(cfg))
    assert int(state.step) == 1
    for path, after in optim.split(state.params, cfg.optim)[0].items():
        steps = np.abs(after - trained[path])  # Lion moves every number by the learning rate
        np.testing.assert_allclose(steps[steps > 0], 0.1, rtol=1e-3, err_msg="/".join(path))
        assert np.any(steps), path


def test_an_unknown_optimizer_is_refused_with_the_choices():
    message = (
        r"optim.kind 'mion' is not an optimizer \(perhaps you meant muon\): choose adamw, muon."
    )
    with pytest.raises(ConfigError, match=message):
        optimizer(Optim("mion"))


def test_every_kernel_names_its_contracted_axes_and_nothing_else_does():
    boxes = traverse_util.flatten_dict(abstract_params(RESAMPLER))
    assert {path for path, box in boxes.items() if box.is_kernel} == {
        path for path in boxes if path[-1] == "kernel"
    }
    assert {path for path, box in boxes.items() if box.is_table} == {
        path for path in boxes if path[-1] == "table"
    }
    out = boxes["vision", "blocks", "layers", "block_0", "self", "out", "kernel"]
    assert (out.letters, out.contracted_axes, out.output_axes) == ("L N H D", (1, 2), (3,))
    linear = boxes["projector", "linear", "kernel"]
    assert (linear.letters, linear.contracted_axes, linear.output_axes) == ("E D", (0,), (1,))


@pytest.mark.parametrize("name", ["self/query", "self/out", "mlp/up"])
def test_muon_makes_the_update_of_a_kernel_orthogonal_with_the_learning_rate_as_its_size(name):
    inputs = 32  # of each of them: D, N x H and D
    cfg = Optim(kind="muon", learning_rate=0.1, warmup_steps=0, weight_decay=0.0)
    key = ("vision", "blocks", "layers", "block_0", *name.split("/"), "kernel")
    shape = flat_params()[key].shape  # of two layers, stacked
    gradient = {key: np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    transform = optimizer(cfg)
    update, _ = transform.update(gradient, transform.init(gradient), gradient)
    assert shape[0] == 2
    for layer in update[key]:
        assert np.sqrt(np.mean(np.square(layer))) == pytest.approx(0.1, rel=0.2)
        singular = np.linalg.svd(np.reshape(layer, (inputs, -1)), compute_uv=False)
        assert singular.max() < 2 * np.quantile(
            singular, 0.1
        )  # five Newton-Schulz steps leave the smallest behind


def test_muon_leaves_everything_but_kernels_to_adam():
    adam, muon = (
        optimizer(Optim(kind=kind, warmup_steps=0, clip_norm=1e9, weight_decay=0.0))
        for kind in ("adamw", "muon")
    )
    params = {
        path: x
        for path, x in flat_params().items()
        if "blocks" not in path or path[-2] == "mlp_norm"
    }
    gradients = filled(params, 0.5)
    by_adam, by_muon = (
        transform.update(gradients, transform.init(params), params)[0] for transform in (adam, muon)
    )
    for path in params:
        assert np.allclose(by_adam[path], by_muon[path]) != (path[-1] == "kernel")
