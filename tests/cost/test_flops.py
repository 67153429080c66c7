"""Our count of FLOPs is XLA's within 3 %, for every model and every choice of trained parts."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from flax import linen as nn
from flax.linen import meta

from vlm_jax import axes, testing
from vlm_jax.config import (
    FUSION_STYLES,
    PROJECTORS,
    ConfigError,
    LrMult,
    Mesh,
    Model,
    Optim,
    Projector,
    ProjectorSpec,
    files,
)
from vlm_jax.config.validate import validate
from vlm_jax.cost import flops
from vlm_jax.nn import projector as nn_projector
from vlm_jax.nn.layers import Dense
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.vlm import example_batch
from vlm_jax.train import optim
from vlm_jax.train.step import batch_loss, state_shapes, train_step

CONFIGS = Path(__file__).parents[2] / "configs"
WIDE = {
    "width": 512,
    "depth": 2,
    "heads": 8,
    "mlp_width": 2048,
    # XLA counts a loop's body once.
    "unroll": 2,
}
ALL, FROZEN = LrMult(), LrMult(0, 0, 0, 0)
TILED = {
    "tiles": 2,
    "tile_layouts": ((1, 1), (1, 2)),
    "num_global_layers": 1,
    "feature_layers": (1,),
}


def wide(kind: str, rates: LrMult, vision: dict | None = None, **sections):
    """Returns a model so wide that matmuls are nearly all of its work.

    Nothing is compiled, so width costs nothing.
    """
    cfg = testing.tiny(kind)
    tower = {**WIDE, "image_size_px": 128, "patch_size_px": 16, **(vision or {})}
    return replace(
        cfg,
        vision=replace(cfg.vision, **tower),
        decoder=replace(cfg.decoder, **WIDE, vocab_size=256, max_positions=512),
        data=replace(cfg.data, text_length=128),
        optim=Optim(lr_mult=rates),
        **sections,
    )


def counted(function, cfg, *arguments) -> float:
    """By XLA, in the program as it is before the compiler changes it."""
    batch = jax.eval_shape(lambda: example_batch(cfg.model, cfg.row_length, cfg.train.batch_size))
    return jax.jit(function).lower(*arguments, batch).cost_analysis()["flops"]


def of_step(cfg) -> float:
    return counted(lambda state, batch: train_step(cfg, state, batch), cfg, state_shapes(cfg))


def split_shapes(cfg) -> tuple[dict, dict]:
    """Shapes of the trained and the frozen parameters, by path."""
    return optim.split(meta.unbox(abstract_params(cfg)), cfg.optim)


@functools.cache
def loss_program(cfg):
    batch = jax.eval_shape(lambda: example_batch(cfg.model, cfg.row_length, cfg.train.batch_size))
    return jax.make_jaxpr(lambda params, batch: batch_loss(cfg, *params, batch))(
        split_shapes(cfg), batch
    )


def loss(cfg):
    """The loss as a function of trained parameters, frozen ones and a batch.

    It is traced once for all choices with a trained head and once for all others: the head has a
    gradient of its own.
    """
    traced = replace(cfg, optim=Optim(lr_mult=LrMult(decoder=cfg.optim.lr_mult.decoder)))
    program = loss_program(traced)

    def compute(trained, frozen, batch):
        params = optim.split(optim.join(trained, frozen), traced.optim)
        inputs = jax.tree.leaves((params, batch))
        (value,) = jax.core.eval_jaxpr(program.jaxpr, program.consts, *inputs)
        return value

    return compute


def of_gradients(cfg) -> float:
    """FLOPs of a step without its optimizer, which has no matmuls."""
    return counted(jax.value_and_grad(loss(cfg)), cfg, *split_shapes(cfg))


@pytest.mark.parametrize("kind", FUSION_STYLES)
def test_forward(kind):
    cfg = wide(kind, FROZEN)
    xla = counted(loss(cfg), cfg, *split_shapes(cfg))
    assert sum(part.forward for part in flops.flops_by_part(cfg).values()) == pytest.approx(
        xla, rel=0.03
    )


# The gradient reaches the first part through the frozen ones, ends in the last, or skips one.
# Everything is trained in the cases of projectors, below.
TRAINED = {
    "unified": [("vision",), ("decoder",), ("projector", "decoder")],
    "cross_attention": [("vision",), ("decoder",), ("vision", "projector", "cross_attention")],
    "encoder_decoder": [("vision", "projector", "cross_attention")],
    "hybrid": [("vision", "projector", "cross_attention")],
}


@pytest.mark.parametrize(
    ("kind", "trained"),
    [(kind, trained) for kind, choices in TRAINED.items() for trained in choices],
    ids=lambda x: x if isinstance(x, str) else "+".join(x),
)
def test_forward_and_backward_with_frozen_parts(kind, trained):
    cfg = wide(kind, replace(FROZEN, **dict.fromkeys(trained, 1.0)))
    assert flops.train_flops(cfg) == pytest.approx(of_gradients(cfg), rel=0.03)


def test_a_whole_step():
    cfg = wide("cross_attention", ALL)
    assert flops.train_flops(cfg) == pytest.approx(of_step(cfg), rel=0.03)


RESAMPLER = Projector("resampler", queries=64, heads=8)
VIEWS = {"tiles": 2, "image_size_px": 64}
CONV = {"class_token": True, "patch_embed": "conv", "pool": "attention"}
RAW_PATCHES = {"kind": "none", "newline_token": True}
KEPT_CLASS = {"class_token": True, "keep_class_token": True}
EVERY = {
    "none": wide("unified", ALL, projector=Projector("none")),
    "linear, tiles": wide("cross_attention", ALL, TILED | KEPT_CLASS),
    "mlp, encoder_free": wide("unified", ALL, RAW_PATCHES, projector=Projector("mlp")),
    "pixel_shuffle, conv": wide("unified", ALL, CONV, projector=Projector("pixel_shuffle")),
    "average_pool, views": wide("unified", ALL, VIEWS, projector=Projector("average_pool")),
    "qformer, memory": wide("encoder_decoder", ALL, projector=replace(RESAMPLER, kind="qformer")),
    "resampler, hybrid": wide("hybrid", ALL, {"tiles": 2}, projector=RESAMPLER),
    "text_only": wide("text_only", ALL),
}


def test_every_projector_has_a_case():
    assert {cfg.projector.kind for cfg in EVERY.values()} == set(PROJECTORS)


@pytest.mark.parametrize("cfg", EVERY.values(), ids=EVERY)
def test_every_projector_and_encoder(cfg):
    assert flops.train_flops(cfg) == pytest.approx(of_gradients(cfg), rel=0.03)


class MaxPool(nn.Module):
    """A projector that README's recipe could add: the maximum of every f x f square of tokens."""

    cfg: Model

    @nn.compact
    def __call__(self, x):
        rows, columns = self.cfg.vision.grid
        f = self.cfg.projector.factor
        x = x.reshape(len(x), rows // f, f, columns // f, f, -1).max((2, 4))
        x = x.reshape(len(x), -1, x.shape[-1])
        return Dense("E D", (x.shape[-1], self.cfg.decoder.width), name="linear")(x)


@pytest.fixture
def max_pool(monkeypatch):
    """One class in nn/projector.py and one row in `PROJECTORS`."""
    row = ProjectorSpec("MaxPool", tokens="squares", fields=("factor",))
    monkeypatch.setattr(nn_projector, "MaxPool", MaxPool, raising=False)
    monkeypatch.setitem(PROJECTORS, "max_pool", row)


def test_a_projector_that_is_added_is_counted(max_pool):
    cfg = wide("unified", ALL, projector=Projector("max_pool"))
    assert flops.train_flops(cfg) == pytest.approx(of_gradients(cfg), rel=0.03)
    linear = replace(cfg, projector=Projector("linear"))
    assert projector_flops(cfg) == projector_flops(linear) / 4


def projector_flops(cfg) -> float:
    return flops.flops_by_part(cfg)["projector"].forward


def test_a_projector_that_is_added_must_divide_the_grid(max_pool):
    cfg = testing.tiny(projector=Projector("max_pool", factor=3))
    with pytest.raises(ConfigError, match="projector.factor 3 does not divide the 2 x 2 patches"):
        validate(cfg)


def test_the_count_is_the_same_on_accelerators():
    """Their attention kernels are single operations of the program."""
    cfg = wide("unified", ALL, {"image_size_px": 256})
    expected = flops.train_flops(cfg)
    flops._row_program.cache_clear()
    with jax.sharding.use_abstract_mesh(on_platform("tpu")):
        assert flops.train_flops(cfg) == expected


def test_the_count_is_the_same_on_any_mesh():
    cfg = wide("cross_attention", ALL)
    expected = flops.train_flops(cfg)
    flops._row_program.cache_clear()
    with jax.set_mesh(axes.make_mesh(Mesh(2, 2, 2))):
        assert flops.train_flops(cfg) == expected


def on_platform(platform: str) -> jax.sharding.AbstractMesh:
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, platform)
    return axes.single_device_mesh(
        jax.sharding.AbstractMesh((1, 1, 1), axes.MESH_AXES, abstract_device=device)
    )


def test_the_head_counts_the_text_of_a_row():
    cfg = wide("unified", ALL)
    larger = replace(cfg, decoder=replace(cfg.decoder, vocab_size=2 * 256))
    more = flops.train_flops(larger) - flops.train_flops(cfg)
    assert more == 3 * 2 * cfg.train.batch_size * cfg.data.text_length * 512 * 256


def test_an_encoder_by_hand():
    """LLaVA: 576 patches of size 588, 24 blocks of width 1024 with an MLP of 4096, 577 tokens."""
    cfg = files.load(str(CONFIGS / "published" / "llava_1_5_7b.py"))
    forward = flops.flops_by_part(replace(cfg, train=replace(cfg.train, batch_size=1)))
    blocks = 24 * (2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024)
    assert forward["vision"].forward == 2 * 576 * 588 * 1024 + blocks


def test_native_resolution_costs_the_budget_of_patches():
    """The projector computes each patch once, and cross-attention reads each token."""

    def counted(max_patches, **row):
        cfg = testing.tiny("cross_attention", projector=Projector("pixel_shuffle", factor=2))
        native = {"max_patches": max_patches, "patch_square": 2, "positions": "none"}
        cfg = replace(cfg, vision=replace(cfg.vision, **native), data=replace(cfg.data, **row))
        return flops.token_flow(cfg), flops.flops_by_part(cfg)

    (tokens, parts), (more_tokens, more_parts) = counted(32), counted(64)
    assert (tokens.memory, more_tokens.memory) == (8, 16)
    assert more_parts["projector"].forward == 2 * parts["projector"].forward
    # Attention over the patches of a row grows with their square.
    assert more_parts["vision"].forward > 2 * parts["vision"].forward
    assert more_parts["decoder"] == parts["decoder"]
    packed, packed_parts = counted(32, images_per_row=4, patches_per_row=64)
    assert (packed.memory, packed.encoder) == (16, 64)
    assert packed_parts == more_parts
