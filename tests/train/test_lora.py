"""Training with LoRA: adapters alone get moments and gradients, however a step is computed."""

from dataclasses import replace

import jax
import pytest
from flax import traverse_util
from jax.sharding import AbstractMesh

from tests.train.steps import EIGHT, assert_same_gradients, experiment, gradients_of
from vlm_jax import axes
from vlm_jax.config import ConfigError, Lora, LrMult, Optim
from vlm_jax.config.validate import validate
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.parts import find_part, is_adapter
from vlm_jax.plan.memory import predict_memory
from vlm_jax.testing import random_params
from vlm_jax.train import optim
from vlm_jax.train.summary import describe_parameters

# The common recipe: adapters in the decoder, the projector in full, a frozen encoder.
CFG = replace(
    experiment("cross_attention"),
    lora=Lora(rank=4, alpha=8, targets=("decoder", "cross_attention")),
    optim=Optim(warmup_steps=0, lr_mult=LrMult(vision=0)),
)


def test_a_frozen_base_has_no_moments():
    trained, frozen = optim.split(random_params(CFG), CFG.optim)
    assert {find_part(path) for path in trained if is_adapter(path)} == {
        "decoder",
        "cross_attention",
    }
    assert all(is_adapter(path) or path[0] == "projector" for path in trained)
    assert not any(map(is_adapter, frozen))
    line = describe_parameters(CFG, random_params(CFG))
    assert line.endswith("frozen: vision, decoder (with LoRA), cross_attention (with LoRA)")


def test_gradients_depend_on_no_mesh_no_remat_and_no_microbatches():
    saving = replace(
        CFG,
        train=replace(CFG.train, microbatches=2),
        decoder=replace(CFG.decoder, remat="full"),
    )
    assert_same_gradients(gradients_of(saving, EIGHT), gradients_of(CFG))


def test_muon_takes_an_adapter_as_two_matrices():
    cfg = replace(CFG, optim=Optim(kind="muon"))
    trained, _ = optim.split(random_params(cfg), cfg.optim)
    jax.eval_shape(optim.optimizer(cfg).init, trained)
    boxes = traverse_util.flatten_dict(abstract_params(cfg))
    layer = ("decoder", "blocks", "layers", "block_0", "self", "out")
    assert boxes[*layer, "lora_a"].contracted_axes == (1, 2)
    assert boxes[*layer, "lora_b"].output_axes == (2,)


@pytest.mark.parametrize(
    "cfg, message",
    [
        (replace(CFG, lora=Lora(alpha=8)), "lora.alpha has no effect without lora.rank"),
        (
            replace(CFG, lora=Lora(rank=4, targets=("decoder:2", "decoder:8"))),
            "lora.targets gives decoder two ranks or alphas: leave one out",
        ),
        (replace(CFG, lora=Lora(rank=4, targets=())), "lora.rank needs lora.targets"),
        (replace(CFG, lora=Lora(rank=0)), "lora.rank is 0: it must be at least 1, or None"),
        (replace(CFG, lora=Lora(rank=2, dropout=1.0)), "lora.dropout is 1.0: it must be below 1"),
        (
            replace(CFG, lora=Lora(rank=4, targets=("vision.mlp",))),
            "optim.lr_mult.vision 0 trains no adapter of lora.targets vision.mlp",
        ),
    ],
)
def test_settings_without_effect_are_refused(cfg, message):
    with pytest.raises(ConfigError, match=message):
        validate(cfg)


def test_remat_saves_no_product_of_an_adapter():
    """Its output is as large as its layer's, which is saved already; x lora_a is small."""
    one_device = AbstractMesh((1, 1, 1), axes.MESH_AXES)
    decoder = replace(CFG.decoder, remat="dots", depth=4)
    cfg = replace(CFG, decoder=decoder, lora=Lora(rank=2))
    base = replace(cfg, lora=Lora(), optim=replace(cfg.optim, lr_mult=LrMult(vision=0)))
    adapted, full = [predict_memory(x, one_device).activations for x in (cfg, base)]
    assert adapted < 1.2 * full
