"""Maps of tiles: the tokens of an image's tiles, put back together without padding."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vlm_jax.config import Projector
from vlm_jax.config.tile_maps import image_length, longest_image, make_tile_map
from vlm_jax.data import pipeline, tiling
from vlm_jax.data.fields import image_fields, map_tokens
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import NEWLINE
from vlm_jax.testing import tiny, write_conversations

N = NEWLINE
GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1))
RNG = np.random.default_rng(0)
# Tiles of 16 px with 4 x 4 tokens, and of 14 px, of which 2 are outside the 3 x 3 tokens.
VISIONS = {
    "whole": replace(tiny().vision, patch_size_px=4, tiles=4, tile_grids=GRIDS, resize="pad")
}
VISIONS["resized"] = replace(VISIONS["whole"], max_map_tiles=1)
VISIONS["with a border"] = replace(VISIONS["whole"], image_size_px=14, max_map_tiles=2)
VISIONS["squashed"] = replace(VISIONS["whole"], resize="squash")
SIZES = [tuple(size) for size in RNG.integers(1, 90, (60, 2)).tolist()] + [(1, 90), (90, 1)]


def test_a_map_has_the_thumbnail_then_the_rows_without_padding():
    """An image of 2 x 1 tiles that fills the two columns in their middle."""
    found = map_tokens(VISIONS["whole"], Projector(), (32, 8), first_view=0, thumbnail_view=2)
    thumbnail = list(range(32, 48))
    first = [1, 2, N, 5, 6, N, 9, 10, N, 13, 14, N]
    second = [17, 18, N, 21, 22, N, 25, 26, N, 29, 30, N]
    assert found["image_token_index"].tolist() == thumbnail + first + second
    assert list(found) == ["image_token_index"]
    # A wide one fills the two rows in the middle of 1 x 2 tiles.
    found = map_tokens(VISIONS["whole"], Projector(), (8, 32))
    rows = [[4, 5, 6, 7, 20, 21, 22, 23, N], [8, 9, 10, 11, 24, 25, 26, 27, N]]
    assert found["image_token_index"].tolist() == rows[0] + rows[1]


def test_an_image_that_is_not_cut_is_its_thumbnail_and_one_vector():
    found = map_tokens(VISIONS["whole"], Projector(), None, first_view=1, thumbnail_view=1)
    assert found["image_token_index"].tolist() == [*range(16, 32), N]


@pytest.mark.parametrize("name", ["resized", "with a border"])
def test_a_resized_map_interpolates_between_its_tokens(name):
    """A slope stays a slope, except at the border, where it is flat."""
    vision, projector = VISIONS[name], Projector()
    tile_map = make_tile_map(vision, projector, (28, 27))
    assert tile_map.resized != (tile_map.rows, tile_map.columns)
    side = projector.output_grid(vision)[0]
    rows, columns = tile_map.grid
    row, column = np.mgrid[: rows * side, : columns * side]
    slope = 3.0 * row + 7.0 * column
    by_tile = slope.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1)
    found = map_tokens(vision, projector, (28, 27))
    is_token = found["image_token_index"] != NEWLINE
    values = (by_tile[found["image_taps"]] * found["tap_weights"]).sum(-1)[is_token]

    def centers(size, new_size, padding):
        position = (np.arange(new_size) + 0.5) * size / new_size - 0.5
        return position.clip(0, size - 1) + padding

    y = centers(tile_map.rows, tile_map.resized[0], tile_map.top)
    x = centers(tile_map.columns, tile_map.resized[1], tile_map.left)
    np.testing.assert_allclose(values, (3 * y[:, None] + 7 * x).reshape(-1), rtol=1e-5)


@pytest.mark.parametrize("name", VISIONS)
def test_an_image_has_the_tokens_and_tiles_that_its_size_predicts(name):
    """Before it is read, as packing needs it; and none has more than a row has room for."""
    vision = VISIONS[name]
    cfg = tiny(vision=vision)
    most = image_length(vision, cfg.projector, longest_image(vision, cfg.projector))
    assert cfg.image_slots_in_row == most
    for height, width in SIZES:
        pixels = tiling.resize_to_grid(Image.new("RGB", (width, height)), vision)
        tiles = tiling.predict_tiles(width, height, vision)
        assert tiling.describe_tiles(pixels, vision) == tiles
        assert tiling.grid_shape(pixels, vision) == tiling.best_layout(width, height, vision)
        fields = image_fields(cfg, tiles)
        assert len(fields["tokens"]) == image_length(vision, cfg.projector, tiles) <= most
        own_views = np.flatnonzero(tiling.view_mask([tiles], vision))
        index = fields["image_token_index"]
        assert set(index[index >= 0] // cfg.image_tokens) <= set(own_views.tolist())
        assert len(own_views) == len(tiling.split_into_views(pixels.astype(np.float32), vision))


@pytest.mark.parametrize("kind", ["cross_attention", "hybrid"])
def test_conversations_that_share_a_row_have_keys_of_their_own(kind, tmp_path):
    cfg = tiny(kind, vision=VISIONS["resized"])
    data = write_conversations(tmp_path, count=4)
    cfg = replace(cfg, data=replace(data, images_per_row=4, text_length=200))
    cfg = replace(cfg, train=replace(cfg.train, batch_size=1))
    tokenizer = Tokenizer.train(["what do you see?"], cfg.decoder.vocab_size)
    batch = next(pipeline.training_iterator(cfg, tokenizer))
    memory, size, views = batch.map_memory, cfg.image_tokens, cfg.vision.views
    slots = memory.views.reshape(4, -1)
    # Images of 24 x 18 px, of which map and thumbnail have as many tokens each.
    length = image_length(cfg.vision, cfg.projector, tiling.predict_tiles(24, 18, cfg.vision))
    length -= size if kind == "hybrid" else 0
    counts = (slots > 0).sum(1)
    assert set(counts.tolist()) <= {0, length}
    read = batch.image_mask[0].reshape(-1, 4, views).any(-1)  # (S, images)
    np.testing.assert_array_equal(read.any(0), counts > 0)
    owners = [set(batch.segment_ids[0][read[:, image]]) for image in np.flatnonzero(counts)]
    assert all(len(segments) == 1 for segments in owners) and len(set.union(*owners)) > 1
    # A key is a token of a view of its image.
    index, of_image = memory.index.reshape(4, -1), np.arange(4)[:, None]
    assert (index // (size * views) == of_image)[index >= 0].all()
    per_image = cfg.vision.cut_tiles if kind == "hybrid" else views
    assert ((slots - 1) // per_image == of_image)[slots > 0].all()


def test_tiles_have_black_borders_and_the_thumbnail_has_none():
    vision = VISIONS["whole"]
    pixels = tiling.to_pixels(Image.new("RGB", (60, 15), "white"), vision)
    assert pixels.shape == (8, 32, 3)
    *tiles, whole = tiling.split_into_views(pixels, vision)
    assert len(tiles) == 2
    for tile in tiles:
        assert (tile[4:12] == 1).all()
        assert (tile[:4] == -1).all()
        assert (tile[12:] == -1).all()
    np.testing.assert_allclose(whole, 1, atol=1e-6)
