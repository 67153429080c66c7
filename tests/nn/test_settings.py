"""Settings of the decoder have their effect, and every parameter has logical axes and a part."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from flax import traverse_util

from tests.nn.models import EXPERIMENTS, decoder, differ, rows, without_images
from vlm_jax import axes
from vlm_jax.config import (
    Experiment,
    Fusion,
    Projector,
    Rope,
)
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.parts import PARTS, find_part
from vlm_jax.structs import PADDING
from vlm_jax.testing import KINDS, random_batch, tiny

SETTINGS = {
    "learned positions": {"positions": "learned"},
    "rope on half a head": {"rope": Rope(fraction=0.5)},
    "another rope.theta": {"rope": Rope(theta=100.0)},
    "free head": {"tie_word_embeddings": False},
    "one kv head": {"kv_heads": 1},
    "as many kv heads as heads": {"kv_heads": None},
    "wide heads": {"head_dim": 16},
    "rmsnorm": {"norm": "rmsnorm"},
    "gated mlp": {"gated_mlp": True},
    "no biases": {"qkv_bias": False, "out_bias": False, "mlp_bias": False},
    "silu": {"activation": "silu"},
    "norms of outputs, and of all query or key heads": {
        "norm_position": "output",
        "qk_norm": "all_heads",
    },
    "no rope": {"no_rope_layers": (0,)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_setting_of_the_decoder_runs_and_changes_the_logits(settings, forward, random_params):
    base = decoder(tiny("cross_attention"), depth=1)
    cfg, batch = decoder(base, **settings), without_images(random_batch(base))
    is_token = batch.segment_ids != PADDING
    logits = forward(cfg, random_params(cfg), batch).logits[is_token]
    base_logits = forward(base, random_params(base), batch).logits[is_token]
    assert np.isfinite(logits).all()
    assert np.abs(logits - base_logits).max() > 1e-3


def test_positions_distinguish_equal_tokens_in_both_schemes(forward, random_params):
    for positions in ("rope", "learned"):
        cfg = decoder(tiny("cross_attention"), positions=positions, depth=1)
        a, b = [11, 22, 33, 44, 55, 66], [22, 11, 33, 44, 55, 66]
        batch = without_images(rows(cfg, [(a[:5], a[5:])], [(b[:5], b[5:])]))
        logits = forward(cfg, random_params(cfg), batch).logits[:, 5]
        assert differ(logits[:1], logits[1:])


def test_blocks_without_rope_know_no_positions_but_the_order(forward, random_params):
    base = decoder(tiny("cross_attention"), depth=1)
    batch = without_images(random_batch(base))
    is_token = batch.segment_ids != PADDING
    for layers in ((), (0,)):
        cfg = decoder(base, no_rope_layers=layers)
        logits, stretched = (
            forward(cfg, random_params(cfg), batch.replace(positions=positions)).logits[is_token]
            for positions in (batch.positions, 3 * batch.positions)
        )
        assert np.array_equal(logits, stretched) == bool(layers)


# Parameters


def all_sorts() -> Iterator[Experiment]:
    for kind in KINDS:
        yield tiny(kind)
        yield tiny(kind, fusion=Fusion(kind=kind, gated=False, cross_layers=(1,)))
    for projector in ("mlp", "pixel_shuffle", "average_pool", "resampler", "qformer"):
        yield tiny(projector=Projector(kind=projector, heads=4))
    latents = Projector("resampler", heads=2, head_dim=6, block_norms=True, projection="none")
    yield tiny(projector=latents)
    gates = Fusion("cross_attention", gated=True, gate="vector")
    yield decoder(tiny(fusion=gates), added_tokens=2, tie_word_embeddings=False)
    yield EXPERIMENTS["fuyu"]
    cfg = decoder(
        tiny(), positions="learned", tie_word_embeddings=False, gated_mlp=True, norm="rmsnorm"
    )
    yield cfg
    yield replace(
        cfg, vision=replace(cfg.vision, class_token=True, pre_norm=True, patch_embed="conv")
    )


def boxes(cfg):
    return traverse_util.flatten_dict(abstract_params(cfg))


@pytest.mark.parametrize(
    "cfg", list(all_sorts()), ids=lambda cfg: f"{cfg.fusion.kind}-{cfg.projector.kind}"
)
def test_every_parameter_has_a_letter_for_each_dimension_and_belongs_to_one_part(cfg):
    params = boxes(cfg)
    for path, box in params.items():
        assert isinstance(box, axes.Partitioned), path
        letters = box.letters.split()
        assert len(letters) == len(box.value.shape), path
        assert set(letters) <= set(axes.ALPHABET), path
        assert ("layers" in path) == (letters[0] == "L"), path
        assert find_part(path) in PARTS, path
    crossing = {path for path in params if find_part(path) == "cross_attention"}
    assert bool(crossing) == cfg.fusion.image_in_memory
    assert {find_part(path) for path in params} >= {"projector", "decoder"}


def test_every_letter_has_one_size_in_the_decoder():
    """Two letters swapped in a parameter would show as a size that is not the letter's."""
    cfg = decoder(tiny("cross_attention"), head_dim=7, positions="learned")
    d = cfg.decoder
    sizes = {"V": 300, "D": 32, "S": 64, "N": 4, "K": 2, "H": 7, "F": 64, "L": d.depth, "1": 1}
    for path, box in boxes(cfg).items():
        if path[0] == "decoder":
            assert box.value.shape == tuple(sizes[letter] for letter in box.letters.split()), path
