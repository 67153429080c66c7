"""The ViT of images in tiles: its padding mask, gates and feature layers."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.linen import meta

from vlm_jax.config import Vision
from vlm_jax.nn.tiled_vit import padding_mask
from vlm_jax.nn.vit import ViT

LAYOUTS = ((1, 1), (1, 2), (2, 1))
CFG = Vision(
    width=16,
    depth=3,
    heads=2,
    mlp_width=32,
    image_size_px=8,
    patch_size_px=4,
    class_token=True,
    keep_class_token=True,
    feature_layers=(0, 2),
    tiles=2,
    tile_layouts=LAYOUTS,
    num_global_layers=2,
)
D = CFG.width
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(2, 2, 8, 8, 3)), jnp.float32)
BOTH_TILES = jnp.ones((2, 2), bool)


@functools.cache
def params():
    init = functools.partial(ViT(CFG).init, jax.random.key(0))
    shapes = meta.unbox(jax.eval_shape(init, IMAGES, jnp.zeros(2, jnp.int32), BOTH_TILES))["params"]
    return jax.tree.map(lambda x: jnp.asarray(RNG.normal(0, 0.3, x.shape), jnp.float32), shapes)


@functools.partial(jax.jit, static_argnums=0)
def features(cfg, params, layouts, tile_mask=BOTH_TILES):
    return ViT(cfg).apply({"params": params}, IMAGES, jnp.asarray(layouts), tile_mask)


def test_padding_does_not_attend_to_padding():
    """Two tiles of two tokens and one of padding; the second tile is absent."""
    picture = """
        1 1 1 1 1 1
        1 1 1 1 1 1
        1 1 . . . .
        1 1 . . . .
        1 1 . . . .
        1 1 . . . .
    """
    mask = padding_mask(jnp.asarray([[True, False]]), length=2, filled=3)
    symbols = np.where(mask[0, 0], "1", ".")
    drawn = [" ".join(row) for row in symbols]
    assert drawn == [line.strip() for line in picture.strip().splitlines()]


def test_a_token_is_the_output_then_the_hidden_states_interleaved():
    y = features(CFG, params(), [1, 2])
    assert y.shape == (2, 2 * (1 + 4), 3 * D) == (2, 10, CFG.output_width)
    for i, layer in enumerate(CFG.feature_layers):
        alone = features(replace(CFG, feature_layers=(layer,)), params(), [1, 2])
        np.testing.assert_allclose(alone[..., :D], y[..., :D], atol=1e-5)
        np.testing.assert_allclose(alone[..., D:], y[..., D + i :: 2], atol=1e-5)


@pytest.mark.parametrize("gate", ["pre_tile_gate", "positions_gate", "post_tile_gate"])
def test_behind_closed_gates_the_layout_of_tiles_makes_no_difference(gate):
    names = ("pre_tile_gate", "positions_gate", "post_tile_gate")
    flat = traverse_util.flatten_dict(params(), sep="/")
    closed = flat | {f"tiled/{name}": jnp.zeros(1) for name in names}
    ajar = closed | {f"tiled/{gate}": jnp.ones(1)}
    closed = traverse_util.unflatten_dict(closed, sep="/")
    ajar = traverse_util.unflatten_dict(ajar, sep="/")
    np.testing.assert_array_equal(features(CFG, closed, [1, 2]), features(CFG, closed, [3, 3]))
    assert np.abs(features(CFG, ajar, [1, 2]) - features(CFG, ajar, [3, 3])).max() > 0.01


def test_the_gates_of_the_second_stage_close_all_of_it():
    flat = traverse_util.flatten_dict(params(), sep="/")
    closed = {
        name: x * 0 if "global_blocks" in name and "gate" in name else x for name, x in flat.items()
    }
    without = replace(CFG, num_global_layers=1)
    shorter = {name: x[:1] if "global_blocks" in name else x for name, x in closed.items()}
    closed = traverse_util.unflatten_dict(closed, sep="/")
    shorter = traverse_util.unflatten_dict(shorter, sep="/")
    np.testing.assert_array_equal(features(CFG, closed, [1, 2]), features(without, shorter, [1, 2]))
