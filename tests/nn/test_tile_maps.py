"""Maps of tiles in the model: in the sequence, and as keys of cross-attention."""

import functools
from dataclasses import replace

import einops
import jax
import numpy as np
import pytest

from vlm_jax import testing
from vlm_jax.cost.flops import token_flow
from vlm_jax.data import questions, text, tiling
from vlm_jax.data.batching import stack_fields
from vlm_jax.infer.generate import SamplingParams, generate
from vlm_jax.nn import fusion
from vlm_jax.nn.parts import find_part
from vlm_jax.nn.vlm import VLM, example_batch
from vlm_jax.structs import NEWLINE, NO_IMAGE, PADDING, Batch
from vlm_jax.testing import tiny


def test_a_slot_holds_the_patch_at_its_place():
    """Images of two grids in a batch; the larger map is resized, and tiles leave no trace."""
    # Without an encoder a token is its patch, which the projector reduces to its mean.
    vision = replace(
        tiny().vision,
        kind="none",
        positions="none",
        patch_size_px=4,
        tiles=4,
        tile_grids=((1, 2), (2, 2)),
        max_map_tiles=2,
    )
    cfg = tiny(vision=vision)
    params = testing.random_params(cfg)
    linear = params["projector"]["linear"]
    linear["kernel"] = np.full_like(linear["kernel"], 1 / vision.patch_dim)
    linear["bias"] = np.zeros_like(linear["bias"])

    rng = np.random.default_rng(0)
    images = [rng.normal(size=(*shape, 3)).astype(np.float32) for shape in ((16, 32), (32, 32))]
    rows = []
    for image in images:
        row = text.pack_row(cfg, [([10, 11], [12])], tiling.describe_tiles(image, vision))
        rows.append(row | {"images": tiling.stack_views([image], vision)})
    batch = Batch(**stack_fields(rows))
    read = jax.jit(VLM(cfg.model).apply, static_argnames="method")
    inputs = np.asarray(read({"params": params}, batch, method=VLM.decoder_inputs).x)

    index = batch.image_token_index
    (newline,) = np.unique(inputs[index == NEWLINE], axis=0)
    np.testing.assert_array_equal(newline, params["projector"]["newline"])
    embedding = params["decoder"]["embedding"]["table"]
    is_text = index == NO_IMAGE
    np.testing.assert_array_equal(inputs[is_text], embedding[batch.tokens[is_text]])

    for row, (image, shape) in enumerate(zip(images, [(4, 8), (5, 5)])):
        means = einops.reduce(image, "(h p) (w q) d -> h w", "mean", p=4, q=4)
        expected = jax.image.resize(means, shape, "bilinear", antialias=False)
        after_thumbnail = inputs[row, index[row] != NO_IMAGE, 0][cfg.image_tokens :]
        found = after_thumbnail.reshape(shape[0], shape[1] + 1)[:, :-1]
        np.testing.assert_allclose(found, expected, atol=1e-5)


GRIDS = ((1, 2), (2, 1), (2, 2))
TEXTS = ["which?", "what is it?", "nothing?"]


def in_memory(kind):
    """Maps of tiles of 2 x 2 tokens, larger ones resized, without an encoder."""
    cfg = tiny(kind)
    vision = replace(cfg.vision, kind="none", tiles=4, tile_grids=GRIDS, max_map_tiles=2)
    return replace(cfg, vision=vision)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (height, width, 3)).astype(np.float32)


# A map of 2 x 4 tokens, one of 4 x 2 without its padding, a resized one, and no image.
PICTURES = [[picture(16, 32), picture(32, 20)], [picture(32, 32)], []]


class Letters:
    """A tokenizer: a character is a token."""

    def encode(self, text):
        return [20 + ord(letter) % 200 for letter in text]


def prompts(cfg, images=PICTURES, texts=TEXTS, length=40) -> Batch:
    return questions.prompt_batch(cfg, Letters(), images, texts, length)


map_tiles = jax.jit(fusion.map_tiles)


@functools.partial(jax.jit, static_argnums=0)
def visible_keys(cfg, batch):
    if cfg.fusion.splits_views:
        mask = fusion.without_thumbnails(cfg, batch.image_mask, axis=2)
        batch = batch.replace(image_mask=mask)
    return fusion.cross_attention_mask(batch, cfg.image_tokens)[:, 0]


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["cross_attention", "hybrid"])
def test_cross_attention_reads_the_tokens_that_a_sequence_would_hold(kind):
    """In the same order; the thumbnail of hybrid is in the sequence, and not among the keys."""
    cfg, of_sequence = in_memory(kind), prompts(in_memory("unified"), length=80)
    batch = prompts(cfg)
    memory = batch.map_memory
    size, thumbnail = cfg.image_tokens, cfg.vision.cut_tiles
    index = of_sequence.image_token_index
    is_held = index != NO_IMAGE
    if kind == "hybrid":
        is_held &= (index < 0) | (index // size % cfg.vision.views != thumbnail)
    for name, slots in {
        "index": index,
        "taps": of_sequence.image_taps,
        "weights": of_sequence.tap_weights,
    }.items():
        for row, keys in enumerate(getattr(memory, name)):
            is_key = memory.views[row] != PADDING
            np.testing.assert_array_equal(keys[is_key], slots[row][is_held[row]])
    # Cost and memory of a run are planned with as many keys.
    planned = jax.eval_shape(lambda: example_batch(cfg.model, length=8, rows=3, images=2))
    shapes = jax.tree.map(np.shape, memory)
    assert jax.tree.map(lambda x: x.shape, planned.map_memory) == shapes
    assert token_flow(cfg).memory == memory.index.shape[1] / 2
    # The vectors that end rows are among them, and keys of padding are nothing.
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(3, batch.image_mask.shape[-1] * size, 32)).astype(np.float32)
    keys = np.asarray(map_tiles(tokens, memory, np.full(32, 7, np.float32)))
    assert (keys[memory.index == NEWLINE] == 7).all()
    assert (keys[memory.views == PADDING] == 0).all()


@pytest.mark.parametrize("kind", ["cross_attention", "encoder_decoder", "hybrid"])
def test_a_tag_reads_the_keys_of_its_tile(kind):
    cfg = in_memory(kind)
    batch = prompts(cfg)
    mask = np.asarray(visible_keys(cfg.model, batch))
    memory, size, views = batch.map_memory, cfg.image_tokens, cfg.vision.views
    read = [set() for _ in range(batch.tokens.shape[1])]
    for slot, keys in zip(*np.nonzero(mask[0] & (memory.index[0] >= 0))):
        read[slot].add(int(memory.index[0, keys]) // size)
    tags = [ids[0] for ids in cfg.tile_tags]
    found = {}
    for slot, token in enumerate(batch.tokens[0]):
        if token in tags:
            found.setdefault(tags.index(token), []).append(read[slot])
    # Two tiles of the first image, four of the second, and the thumbnail of each.
    whole = [set(), set()] if kind == "hybrid" else [{4}, {views + 4}]
    assert found == {
        0: [{0}, {views}],
        1: [{1}, {views + 1}],
        2: [{views + 2}],
        3: [{views + 3}],
        4: whole,
    }
    assert read[-1] == set().union(*(tile for tiles in found.values() for tile in tiles))
    assert not mask[2].any()


@pytest.mark.parametrize("kind", ["cross_attention", "hybrid"])
def test_a_batch_of_maps_is_one_by_one_and_no_other_image_leaks(kind, forward, random_params):
    cfg = in_memory(kind)
    params, batch = random_params(cfg), prompts(cfg)
    logits = forward(cfg, params, batch).logits
    is_token = batch.segment_ids != 0
    for row in (1, 2):
        alone = prompts(cfg, [PICTURES[0], PICTURES[row], []], ["?", TEXTS[row], "?"])
        expected = forward(cfg, params, alone).logits[1]
        close(logits[row][is_token[row]], expected[alone.segment_ids[1] != 0])

    def moved(is_changed):
        noise = picture(*batch.images.shape[-3:-1], seed=9)
        images = np.where(is_changed[..., None, None, None], noise, batch.images)
        other = forward(cfg, params, batch.replace(images=images)).logits
        return [bool(np.abs(a - b)[own].max() > 1e-4) for a, b, own in zip(logits, other, is_token)]

    is_view = batch.images.any((-3, -2, -1))
    assert moved(~is_view) == [False] * 3
    is_first = np.zeros_like(is_view)
    is_first[0] = is_view[0]
    assert moved(is_first) == [True, False, False]


def test_a_decoded_token_reads_the_maps_of_its_row(forward, random_params):
    cfg = in_memory("cross_attention")
    params, batch = random_params(cfg), prompts(cfg)
    new = np.asarray(generate(cfg.model, params, batch, 2, SamplingParams()))
    longer = prompts(cfg, texts=[text + "\n" for text in TEXTS])
    tokens = np.concatenate([longer.tokens[:, :-1], new[:, :1]], axis=1)
    logits = forward(cfg, params, longer.replace(tokens=tokens)).logits[:, -1]
    np.testing.assert_array_equal(new[:, 1], logits.argmax(-1))


def test_the_vector_that_ends_a_row_is_trained_with_the_projector():
    assert find_part(("projector", "newline")) == "projector"
