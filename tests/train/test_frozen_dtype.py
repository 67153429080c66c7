"""Frozen kernels in 8 and 4 bits: a step is the step with the dequantized kernels."""

import functools
from dataclasses import replace

import jax
import pytest
from flax import traverse_util

from tests.train.steps import EIGHT, ONE, assert_same_gradients, experiment, mesh_of, uneven_batch
from vlm_jax import sharding
from vlm_jax.config import ConfigError, Lora, LrMult, Optim
from vlm_jax.config.validate import validate
from vlm_jax.nn.quantized import Quantized, is_quantized
from vlm_jax.plan.document import part_costs
from vlm_jax.testing import random_params
from vlm_jax.train import optim
from vlm_jax.train.step import abstract_state, cast_for_storage, loss_and_gradients
from vlm_jax.train.summary import describe_frozen

CFG = replace(
    experiment("cross_attention"),
    lora=Lora(rank=4, alpha=8, targets=("decoder", "cross_attention")),
    optim=Optim(warmup_steps=0, lr_mult=LrMult(vision=0)),
)


def with_frozen(cfg, dtype):
    return replace(cfg, train=replace(cfg.train, frozen_dtype=dtype))


NF4 = with_frozen(CFG, "nf4")


@functools.cache
def stored_params():
    return jax.device_get(jax.jit(functools.partial(cast_for_storage, NF4))(random_params(NF4)))


def gradients_of(cfg, params, shape):
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        like = abstract_state(cfg, mesh).params
        params = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), params, like)
        batch = jax.device_put(uneven_batch(cfg), sharding.row_sharding(mesh))
        trained, frozen = optim.split(params, cfg.optim)
        function = jax.jit(functools.partial(loss_and_gradients, cfg))
        (loss, _), gradients = function(trained, frozen, batch)
        return jax.device_get((loss, gradients))


def test_a_step_on_eight_devices_is_the_step_with_dequantized_kernels_on_one():
    dense = jax.jit(
        lambda tree: jax.tree.map(
            lambda x: x.dequantize() if is_quantized(x) else x, tree, is_leaf=is_quantized
        )
    )(stored_params())
    expected = gradients_of(CFG, dense, ONE)
    assert_same_gradients(gradients_of(NF4, stored_params(), EIGHT), expected)


def test_kernels_of_frozen_parts_are_quantized_and_nothing_else():
    params = traverse_util.flatten_dict(stored_params())
    quantized = {path for path, x in params.items() if is_quantized(x)}
    assert {path[-1] for path in quantized} == {"kernel"}
    others = {path[:2] for path in params.keys() - quantized if path[-1] == "kernel"}
    # The first is not in a block, and the second is trained.
    assert others == {("vision", "patch_embed"), ("projector", "linear")}
    line = describe_frozen(NF4, stored_params())
    assert line.startswith("vision 0.0 MiB in nf4 instead of 0.0 MiB in bfloat16, with an RMS")


def test_the_plan_counts_weights_and_not_scales():
    costs, dense = part_costs(NF4), part_costs(CFG)
    for part, expected in dense.items():
        has_frozen = expected["trained_parameters"] < expected["parameters"]
        assert bool(costs[part].pop("quantized_parameters")) == has_frozen
        assert expected.pop("quantized_parameters") == 0
    assert costs == dense


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "nf4"])
def test_without_anything_frozen_it_is_refused(dtype):
    cfg = replace(with_frozen(CFG, dtype), lora=Lora(), optim=Optim())
    with pytest.raises(ConfigError, match=f"train.frozen_dtype {dtype} has no effect, because all"):
        validate(cfg)


def test_frozen_parameters_have_their_own_float_dtype():
    params = jax.eval_shape(
        functools.partial(cast_for_storage, with_frozen(CFG, "bfloat16")), random_params(CFG)
    )
    trained, frozen = optim.split(params, CFG.optim)
    assert {str(x.dtype) for x in frozen.values()} == {"bfloat16"}
    assert {str(x.dtype) for x in trained.values()} == {"float32"}
    assert not any(isinstance(x, Quantized) for x in frozen.values())
