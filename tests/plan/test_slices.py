"""Predictions for TPU slices against the TPU compiler; needs requirements-tpu.txt."""

import importlib.util
import re
import time
from dataclasses import replace

import pytest

from vlm_jax import axes, testing
from vlm_jax.config import (
    LrMult,
    Mesh,
    Optim,
    Train,
)
from vlm_jax.plan import compiled, memory

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs requirements-tpu.txt"
)


# Rows by `remat`, which fill more than half of a chip's memory.
ROWS = {"none": 32, "attention": 96, "dots": 128, "full": 256}


def experiment(kind="unified", remat="none", rates=None, **sizes):
    cfg = testing.tiny(kind)
    stack = {"width": 2048, "depth": 4, "heads": 16, "mlp_width": 8192, "remat": remat} | sizes
    return replace(
        cfg,
        vision=replace(cfg.vision, image_size_px=256, patch_size_px=16, **stack),
        decoder=replace(cfg.decoder, **stack, vocab_size=32000, max_positions=1024, gated_mlp=True),
        data=replace(cfg.data, text_length=512),
        optim=Optim(lr_mult=rates or LrMult()),
        train=Train(batch_size=ROWS[remat], compute_dtype="bfloat16"),
        mesh=Mesh(data=1, fsdp=-1),
    )


def four_chips(cfg):
    return axes.make_mesh(cfg.mesh, compiled.tpu_devices("v5e:2x2"))


FROZEN = LrMult(vision=0, decoder=0)
CASES = [(kind, remat, LrMult()) for kind in testing.KINDS for remat in ROWS]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, remat, rates", [*CASES, ("unified", "none", FROZEN), ("unified", "full", FROZEN)]
)
def test_the_predicted_peak_is_near_the_compilers(kind, remat, rates):
    cfg = experiment(kind, remat=remat, rates=rates)
    mesh = four_chips(cfg)
    predicted = memory.predict_memory(cfg, mesh.abstract_mesh).total
    assert predicted == pytest.approx(compiled.compile_step(cfg, mesh).hbm_bytes, rel=0.15)


def lowered_text(remat):
    """StableHLO of the step: the kernels in it are those that the compiler gets."""
    cfg = experiment(remat=remat, width=128, depth=2, heads=2, mlp_width=128)
    cfg = replace(
        cfg,
        decoder=replace(cfg.decoder, head_dim=64, vocab_size=128),
        train=replace(cfg.train, batch_size=4),
    )
    return cfg.row_length, compiled.lower_train_step(cfg, four_chips(cfg)).as_text()


def kernels_of_attention(text):
    return re.findall(r'kernel_name = "splash_mha_(fwd|dq|dkv)', text)


def test_attention_is_a_kernel_that_holds_no_scores():
    row_length, text = lowered_text("none")
    assert {"fwd", "dq", "dkv"} == set(kernels_of_attention(text))
    length = -(-row_length // 128) * 128
    assert not re.search(rf"{length}x{length}x(bf16|f32)>", text)


def test_packed_conversations_need_no_mask_in_memory():
    """A mask (B, 1, S, T) would be read by every layer."""
    cfg = experiment(width=128, depth=2, heads=2, mlp_width=128)
    cfg = replace(
        cfg,
        decoder=replace(cfg.decoder, head_dim=64, vocab_size=128),
        data=replace(cfg.data, source="conversations", files=("a.json",)),
        train=replace(cfg.train, batch_size=4),
    )
    text = compiled.lower_train_step(cfg, four_chips(cfg)).as_text()
    decoder = re.findall(r'kernel_name = "splash_mha_(fwd|dq|dkv)_segmented', text)
    assert set(decoder) == {"fwd", "dq", "dkv"}
    masks = [kernels for kernels in kernels_of_attention(text) if kernels == "fwd"]
    # Kernels of the encoder: images are not packed.
    assert len(masks) - decoder.count("fwd") == decoder.count("fwd")


def test_what_the_kernel_gave_is_kept_by_remat_attention_and_computed_again_by_remat_dots():
    counts = {
        remat: kernels_of_attention(lowered_text(remat)[1]).count("fwd")
        for remat in ("attention", "dots")
    }
    assert counts == {"attention": 2, "dots": 4}  # of the encoder and of the decoder


@pytest.mark.slow
def test_compile_time_and_size_of_the_program_do_not_grow_with_depth():
    """Seconds of the processor, which other work does not lengthen."""
    sizes, seconds = [], []
    for depth in (12, 48):
        cfg = experiment(remat="full", depth=depth, width=512, heads=4, mlp_width=2048)
        begun = time.process_time()
        step = compiled.compile_step(cfg, four_chips(cfg))
        seconds.append(time.process_time() - begun)
        sizes.append(step.code_bytes)
    assert sizes[1] < 1.3 * sizes[0]
    assert seconds[1] < 1.3 * seconds[0]
