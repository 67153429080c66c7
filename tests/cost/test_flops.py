"""Our count of FLOPs is XLA's within 3 %, whatever is fused how and whatever is trained."""

import dataclasses
from pathlib import Path

import jax
import pytest

from vlm_jax import testing
from vlm_jax.config import LrMult, Optim, Projector, files
from vlm_jax.cost import flops
from vlm_jax.nn.vlm import VLM, example_batch
from vlm_jax.train.step import state_shapes, train_step

CONFIGS = Path(__file__).parents[2] / "configs"
WIDE = {
    "width": 512,
    "depth": 2,
    "heads": 8,
    "mlp_width": 2048,
    "unroll": 2,
}  # XLA counts a loop's body once
ALL, FROZEN = LrMult(), LrMult(0, 0, 0, 0)
TILED = {
    "tiles": 2,
    "tile_layouts": ((1, 1), (1, 2)),
    "num_global_layers": 1,
    "feature_layers": (1,),
}


def wide(kind: str, rates: LrMult, vision: dict | None = None, **sections):
    """Wide enough for products to be nearly all of the work. Nothing is compiled, so width costs nothing."""
    cfg = testing.tiny(kind)
    tower = {**WIDE, "image_size_px": 128, "patch_size_px": 16, **(vision or {})}
    return dataclasses.replace(
        cfg,
        vision=dataclasses.replace(cfg.vision, **tower),
        decoder=dataclasses.replace(cfg.decoder, **WIDE, vocab_size=256, max_positions=512),
        data=dataclasses.replace(cfg.data, text_length=128),
        optim=Optim(lr_mult=rates),
        **sections,
    )


def counted(function, cfg, *arguments) -> float:
    """By XLA, in the program as it is before the compiler changes it."""
    batch = jax.eval_shape(lambda: example_batch(cfg.model, cfg.row_length, cfg.train.batch_size))
    return jax.jit(function).lower(*arguments, batch).cost_analysis()["flops"]


def of_step(cfg) -> float:
    return counted(lambda state, batch: train_step(cfg, state, batch), cfg, state_shapes(cfg))


@pytest.mark.parametrize("kind", testing.KINDS)
def test_forward(kind):
    cfg = wide(kind, ALL)
    xla = counted(
        lambda params, batch: VLM(cfg.model).apply({"params": params}, batch).logits,
        cfg,
        state_shapes(cfg).params,
    )
    assert sum(part.forward for part in flops.flops_by_part(cfg).values()) == pytest.approx(
        xla, rel=0.03
    )


@pytest.mark.parametrize(
    "trained",
    [
        ("vision", "projector", "decoder", "cross_attention"),
        ("vision",),
        ("projector",),
        ("decoder",),
        ("projector", "decoder"),
        ("vision", "projector", "cross_attention"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("kind", testing.KINDS)
def test_forward_and_backward_with_frozen_parts(kind, trained):
    cfg = wide(kind, dataclasses.replace(FROZEN, **dict.fromkeys(trained, 1.0)))
    assert flops.train_flops(cfg) == pytest.approx(of_step(cfg), rel=0.03)


@pytest.mark.parametrize(
    "cfg",
    [
        wide("unified", ALL, projector=Projector("mlp")),
        wide("unified", ALL, projector=Projector("pixel_shuffle")),
        wide("cross_attention", ALL, projector=Projector("resampler", queries=64, heads=8)),
        wide("unified", ALL, {"kind": "none", "newline_token": True}),
        wide("unified", ALL, {"class_token": True, "patch_embed": "conv", "pool": "attention"}),
        wide("cross_attention", ALL, {**TILED, "class_token": True, "keep_class_token": True}),
        wide("hybrid", ALL, {"tiles": 2}, projector=Projector("resampler", queries=64, heads=8)),
        wide("unified", ALL, {"tiles": 2, "image_size_px": 64}),
        wide("text_only", ALL),
    ],
    ids=[
        "mlp",
        "pixel_shuffle",
        "resampler",
        "encoder_free",
        "conv",
        "tiles",
        "hybrid",
        "views",
        "text_only",
    ],
)
def test_every_projector_and_encoder(cfg):
    assert flops.train_flops(cfg) == pytest.approx(of_step(cfg), rel=0.03)


def test_the_head_counts_the_text_of_a_row():
    cfg = wide("unified", ALL)
    larger = dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, vocab_size=2 * 256))
    more = flops.train_flops(larger) - flops.train_flops(cfg)
    assert more == 3 * 2 * cfg.train.batch_size * cfg.data.text_length * 512 * 256


def test_an_encoder_by_hand():
    """LLaVA's sizes: 576 patches of 588 numbers, CLIP's width 1024, 577 tokens in 24 blocks with an MLP of 4096."""
    cfg = files.load(str(CONFIGS / "published" / "llava_1_5_7b.py"))
    forward = flops.flops_by_part(
        dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=1))
    )
    blocks = 24 * (2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024)
    assert forward["vision"].forward == 2 * 576 * 588 * 1024 + blocks
