"""Images in tiles, for every fusion style: the tokens that each tile reaches."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import traverse_util

from vlm_jax.config import Projector
from vlm_jax.data import questions, text, tiling
from vlm_jax.nn.parts import find_part
from vlm_jax.nn.vlm import empty_cache
from vlm_jax.structs import NO_IMAGE, PADDING, Batch
from vlm_jax.testing import KINDS, tiny

MOST = 3  # tiles; its images have 1 to 3
THUMBNAIL = MOST
every_kind = pytest.mark.parametrize("kind", KINDS)


def experiment(kind, **settings):
    """Without an encoder, which takes half of the time to compile; two image tokens a view."""
    cfg = tiny(kind, projector=Projector("resampler", heads=4, queries=2, depth=1))
    vision = replace(cfg.vision, kind="none", tiles=MOST, **settings)
    return replace(cfg, vision=vision, decoder=replace(cfg.decoder, depth=1))


def picture(count, seed=0):
    """An image of `count` tiles of 16 px, side by side."""
    return (
        np.random.default_rng((count, seed)).uniform(-1, 1, (16, 16 * count, 3)).astype(np.float32)
    )


def rows(cfg, *counts) -> Batch:
    """For every count, a row with two questions about an image of that many tiles."""
    pairs = [([20, 21, 22], [23, 24]), ([30, 31], [32])]
    packed = [
        text.pack_row(cfg, pairs, count)
        | {"images": tiling.stack_views([picture(count)], cfg.vision)}
        for count in counts
    ]
    return Batch(**{name: np.stack([row[name] for row in packed]) for name in packed[0]})


def with_noise_in(batch, row, view):
    images = np.array(batch.images)
    images[row, view] = np.random.default_rng(9).uniform(-1, 1, images.shape[2:])
    return batch.replace(images=images)


def moves(forward, cfg, params, batch, row, view):
    """(S,) bool: the tokens of a row whose logits are others when a view is another."""
    logits = forward(cfg, params, batch).logits[row]
    other = forward(cfg, params, with_noise_in(batch, row, view)).logits[row]
    return np.abs(np.subtract(logits, other)).max(-1) > 1e-4


def tags(cfg, batch, row):
    """Index of the tag of every view in a row."""
    ids = [tag for (tag,) in cfg.tile_tags]
    return [
        int(np.flatnonzero(batch.tokens[row] == tag)[0]) if tag in batch.tokens[row] else None
        for tag in ids
    ]


@every_kind
def test_every_present_view_reaches_the_questions_and_no_absent_one_does(
    kind, forward, random_params
):
    cfg = experiment(kind)
    batch, params = rows(cfg, 2, 3, 1, 2), random_params(cfg)
    for row, views in [(0, (0, 1, THUMBNAIL)), (2, (0,))]:
        is_question = batch.branch_ids[row] > 0
        for view in range(cfg.vision.views):
            moved = moves(forward, cfg, params, batch, row, view)
            assert moved[is_question].all() == moved.any() == (view in views), (row, view)


@every_kind
def test_a_tag_does_not_know_the_tiles_after_its_own(kind, forward, random_params):
    """test_masks.py draws the cross-attention of a tag; it also attends to earlier tokens."""
    cfg = experiment(kind)
    batch, params = rows(cfg, 3, 3, 3, 3), random_params(cfg)
    first, second, third, whole = tags(cfg, batch, 0)
    moved = {view: moves(forward, cfg, params, batch, 0, view) for view in range(cfg.vision.views)}
    reads_own = kind != "unified"  # in unified it precedes its tile's tokens
    assert moved[1][first] == moved[2][first] == moved[2][second] == False  # noqa: E712
    assert moved[0][first] == moved[1][second] == moved[2][third] == reads_own
    assert moved[THUMBNAIL][whole] == (kind in ("cross_attention", "encoder_decoder"))


@pytest.mark.parametrize("kind", ["cross_attention", "unified"])
def test_tiles_without_names_are_exchangeable_for_cross_attention_alone(
    kind, forward, random_params
):
    """Why NVLM names its tiles (tables 1 and 2): in `unified` they have an order, at least."""
    cfg = experiment(kind, tile_tags="none", thumbnail=False)
    batch, params = rows(cfg, MOST, MOST, MOST, MOST), random_params(cfg)
    logits = forward(cfg, params, batch).logits
    permuted = batch.replace(images=batch.images[:, ::-1])
    difference = np.abs(np.subtract(forward(cfg, params, permuted).logits, logits)).max(-1)
    is_question = batch.branch_ids > 0
    if kind == "cross_attention":
        assert difference.max() < 1e-5
    else:
        assert difference[is_question].min() > 1e-3


PROMPTS = ["which of the two?", "what?", "small?", "nothing?"]
IMAGES = [[picture(2)], [picture(3)], [picture(1)], []]


def mixed_prompts(cfg) -> Batch:
    """In the shape of four training rows."""
    return questions.prompt_batch(cfg, Letters(), IMAGES, PROMPTS, cfg.row_length)


@every_kind
def test_a_batch_of_mixed_tile_counts_is_one_by_one(kind, forward, random_params):
    cfg, params = experiment(kind), random_params(experiment(kind))
    batch = mixed_prompts(cfg)
    logits = forward(cfg, params, batch).logits
    for row, images in enumerate(IMAGES):
        # Four equal rows instead of one, so that it is the program of the mixed batch.
        alone = questions.prompt_batch(
            cfg, Letters(), [images] * 4, [PROMPTS[row]] * 4, cfg.row_length
        )
        is_token = alone.segment_ids[0] != PADDING
        expected = forward(cfg, params, alone).logits[0]
        np.testing.assert_allclose(logits[row][is_token], expected[is_token], rtol=1e-4, atol=2e-4)


def test_cached_is_uncached_with_mixed_tile_counts(forward, random_params):
    """test_vlm.py has the other styles; here the memory has absent tiles."""
    cfg, params = experiment("cross_attention"), random_params(experiment("cross_attention"))
    batch = mixed_prompts(cfg)
    logits, length = forward(cfg, params, batch).logits, batch.tokens.shape[1] - 1
    text_fields = batch.replace(images=None)
    prompt = jax.tree.map(lambda x: x[:, :length], text_fields).replace(images=batch.images)
    cache = forward(cfg, params, prompt, empty_cache(cfg.model, prompt, 1)).cache
    last = forward(cfg, params, jax.tree.map(lambda x: x[:, length:], text_fields), cache).logits
    np.testing.assert_allclose(last[:, 0], logits[:, -1], rtol=1e-4, atol=2e-4)


class Letters:
    """A tokenizer of bytes."""

    def encode(self, text):
        return list(text.encode())


@pytest.mark.parametrize("count", [1, 3])
def test_with_closed_gates_hybrid_is_unified_with_the_thumbnail_alone(
    count, forward, random_params
):
    """An image of one tile: unified with that tile.

    Nothing comes through the gates, bit for bit; two programs round differently.
    """
    cfg = experiment("hybrid")
    cfg = replace(cfg, fusion=replace(cfg.fusion, gated=True))
    batch = rows(cfg, *[count] * 4)
    flat = traverse_util.flatten_dict(random_params(cfg))
    closed = traverse_util.unflatten_dict(
        {path: np.zeros_like(x) if path[-1].endswith("gate") else x for path, x in flat.items()}
    )
    hidden = forward(cfg, closed, batch).logits
    view, plain = THUMBNAIL if count > 1 else 0, experiment("unified")
    others = np.arange(cfg.vision.views)[:, None, None, None] != view
    other_tiles = batch.replace(images=np.where(others, -batch.images, batch.images))
    np.testing.assert_array_equal(forward(cfg, closed, other_tiles).logits, hidden)
    plain = replace(plain, vision=replace(plain.vision, tiles=1))
    slots = np.where(
        batch.image_token_index == NO_IMAGE,
        NO_IMAGE,
        batch.image_token_index - view * cfg.image_tokens,
    )
    alone = batch.replace(
        images=batch.images[:, view : view + 1],
        image_token_index=slots,
        image_mask=batch.image_mask[..., :1],
    )
    own = {path: x for path, x in flat.items() if find_part(path) != "cross_attention"}
    expected = forward(plain, traverse_util.unflatten_dict(own), alone).logits
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-5)
    is_token = batch.segment_ids != PADDING
    opened = forward(cfg, random_params(cfg), batch).logits
    assert (np.abs(np.subtract(opened, expected)).max(-1) > 1e-3)[is_token].any()
