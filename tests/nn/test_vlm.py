"""The whole model: what may reach a token's logits and what may not, for every fusion style."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import traverse_util
from flax.linen import meta

from tests.nn.models import (
    EXPERIMENTS,
    close,
    differ,
    every_style,
    pair,
    pictures,
    prompts,
    rows,
    with_memory,
    without_images,
)
from vlm_jax.config import Experiment, Fusion
from vlm_jax.nn.models import initializer
from vlm_jax.nn.parts import find_part
from vlm_jax.nn.vlm import empty_cache
from vlm_jax.structs import PADDING, Batch
from vlm_jax.testing import random_batch, tiny

GATED = tiny(fusion=Fusion("cross_attention", gated=True))

# Attention


@every_style
def test_nothing_after_a_token_changes_its_logits(cfg, forward, random_params):
    """Row t has other tokens after token t, for every t, four rows at a time."""
    params, length = random_params(cfg), cfg.row_length
    row = rows(cfg, *[[pair(prompt=cfg.data.text_length - 2)]] * 4)
    logits, slots, is_text = (
        forward(cfg, params, row).logits[0],
        np.arange(length),
        row.image_token_index[0] < 0,
    )
    for start in range(0, length, 4):
        t = np.arange(start, start + 4)[:, None]
        changed = (slots > t) & is_text
        other = row.replace(tokens=np.where(changed, (row.tokens + t + 1) % 300, row.tokens))
        other_logits = forward(cfg, params, other).logits
        kept = np.broadcast_to(slots <= t, changed.shape)
        close(other_logits[kept], np.broadcast_to(logits, other_logits.shape)[kept])
        assert differ(other_logits[changed], np.broadcast_to(logits, other_logits.shape)[changed])


@every_style
def test_padding_changes_nothing(cfg, forward, random_params):
    """For any content of the padding; the test of several lengths varies its amount."""
    batch, params = random_batch(cfg), random_params(cfg)
    empty = batch.segment_ids == PADDING
    assert empty.any()
    noisy = batch.replace(
        tokens=np.where(empty, 77, batch.tokens),
        positions=np.where(empty, 5, batch.positions),
        branch_ids=np.where(empty, 1, batch.branch_ids),
        image_mask=batch.image_mask | empty[..., None],
    )
    close(forward(cfg, params, noisy).logits[~empty], forward(cfg, params, batch).logits[~empty])


@every_style
def test_a_packed_row_has_the_logits_of_one_question_a_row(cfg, forward, random_params):
    pairs = [pair(4, 2, seed=0), pair(3, 1, seed=1), pair(5, 2, seed=2)]
    batch = rows(cfg, pairs, *([one] for one in pairs))
    logits = np.asarray(forward(cfg, random_params(cfg), batch).logits)
    for i in range(3):
        packed, alone = batch.branch_ids[0] == i + 1, batch.branch_ids[i + 1] == 1
        np.testing.assert_array_equal(batch.tokens[0][packed], batch.tokens[i + 1][alone])
        close(logits[0][packed], logits[i + 1][alone])


@every_style
def test_another_question_in_a_packed_row_changes_nothing(cfg, forward, random_params):
    first, last = pair(seed=0), pair(seed=1)
    batch = rows(cfg, *([first, pair(seed=2 + i), last] for i in range(4)))
    logits = np.asarray(forward(cfg, random_params(cfg), batch).logits)
    changed = batch.branch_ids[0] == 2
    assert not np.array_equal(batch.tokens[0][changed], batch.tokens[1][changed])
    others = ~changed & (batch.segment_ids[0] != PADDING)
    close(logits[0][others], logits[1][others])
    assert differ(logits[0][changed], logits[1][changed])


# The image


@every_style
def test_the_image_matters_where_it_is_read(cfg, forward, random_params):
    batch, params = random_batch(cfg), random_params(cfg)
    reads = batch.segment_ids != PADDING
    logits, other = (
        forward(cfg, params, b).logits for b in (batch, batch.replace(images=-batch.images))
    )
    assert differ(logits[reads], other[reads])


def test_a_text_only_model_looks_at_no_image_that_it_is_given(forward, random_params):
    cfg = tiny("text_only")
    batch, params = random_batch(cfg), random_params(cfg)
    np.testing.assert_array_equal(
        *(forward(cfg, params, b).logits for b in (batch, without_images(batch)))
    )


def gates_of(params):
    flat = traverse_util.flatten_dict(params)
    return {path: value for path, value in flat.items() if path[-1].endswith("gate")}


def test_the_gates_of_a_new_model_are_closed():
    cfg = GATED
    # XLA leaves out all other parameters.
    gates_of_new = jax.jit(lambda key: gates_of(meta.unbox(initializer(cfg)(key))))
    gates = list(gates_of_new(jax.random.key(0)).values())
    assert len(gates) == 2
    assert not np.any(gates)


def test_with_closed_gates_cross_attention_is_the_text_only_decoder_bit_for_bit(
    forward, random_params
):
    """The decoder without cross-attention is `unified` given text alone."""
    cfg, plain, batch = GATED, tiny("unified"), random_batch(GATED)
    flat = traverse_util.flatten_dict(random_params(cfg))
    own = {path: value for path, value in flat.items() if find_part(path) != "cross_attention"}
    expected = forward(plain, traverse_util.unflatten_dict(own), without_images(batch)).logits
    closed = flat | {
        path: np.zeros_like(value) for path, value in gates_of(random_params(cfg)).items()
    }
    np.testing.assert_array_equal(
        forward(cfg, traverse_util.unflatten_dict(closed), batch).logits, expected
    )
    there = batch.segment_ids != PADDING
    assert differ(forward(cfg, random_params(cfg), batch).logits[there], expected[there])


@pytest.mark.parametrize("cfg", [GATED, EXPERIMENTS["cross_attention"]], ids=["gated", "ungated"])
def test_on_text_alone_cross_attention_is_its_decoder_bit_for_bit(cfg, forward, random_params):
    """Open gates or none: a frozen decoder keeps its answers to questions without an image."""
    text_alone = without_images(random_batch(cfg))
    flat = traverse_util.flatten_dict(random_params(cfg))
    own = {path: value for path, value in flat.items() if find_part(path) == "decoder"}
    decoder = traverse_util.unflatten_dict(own)
    expected = forward(tiny("unified"), decoder, text_alone).logits
    np.testing.assert_array_equal(forward(cfg, random_params(cfg), text_alone).logits, expected)


@with_memory
def test_a_row_that_reads_no_image_is_text_only_even_with_open_gates(cfg, forward, random_params):
    batch, params = random_batch(cfg), random_params(cfg)
    alone = forward(cfg, params, without_images(batch)).logits
    blind = batch.replace(image_mask=np.zeros_like(batch.image_mask))
    np.testing.assert_allclose(forward(cfg, params, blind).logits, alone, rtol=1e-5, atol=1e-5)
    there = batch.segment_ids != PADDING
    assert differ(forward(cfg, params, batch).logits[there], alone[there])


# Caches and batches

NEW = 3
ASKED = ("what?", "no image at all?", "and here?", "two?")
# `fuyu` is `unified` without an encoder, and a newline is a token.
decoders = pytest.mark.parametrize("kind", [kind for kind in EXPERIMENTS if kind != "fuyu"])


def mixed_prompts(cfg) -> Batch:
    return prompts(cfg, pictures(cfg, (1, 0, 1, 1)), ASKED)


@decoders
def test_cached_is_uncached_and_compiled_once(kind, forward, random_params):
    """Left-padded prompts of several lengths; three tokens follow one at a time."""
    cfg = EXPERIMENTS[kind]
    whole, params = mixed_prompts(cfg), random_params(cfg)
    length = whole.tokens.shape[1] - NEW
    text_fields = whole.replace(images=None)
    prompt = jax.tree.map(lambda x: x[:, :length], text_fields).replace(images=whole.images)
    out = forward(cfg, params, prompt, empty_cache(cfg.model, prompt, NEW))
    logits = [out.logits]
    for i in range(NEW):
        token = jax.tree.map(lambda x, at=length + i: x[:, at : at + 1], text_fields)
        out = forward(cfg, params, token, out.cache)
        logits.append(out.logits)
        if i == 0:
            compiled = forward.compiled_programs()
    assert forward.compiled_programs() == compiled
    there = whole.segment_ids != PADDING
    close(np.concatenate(logits, axis=1)[there], forward(cfg, params, whole).logits[there])


@decoders
def test_a_batch_of_mixed_lengths_and_image_counts_is_one_by_one(kind, forward, random_params):
    """A prompt alone has less padding; one without an image is text only.

    Four equal rows instead of one have the shapes of the tests above and below.
    """
    cfg = EXPERIMENTS[kind]
    batch, params = mixed_prompts(cfg), random_params(cfg)
    logits = forward(cfg, params, batch).logits
    shorter = cfg.row_length - NEW
    alone = prompts(cfg, pictures(cfg, [1]) * 4, ASKED[:1] * 4, shorter)
    own = forward(cfg, params, alone, empty_cache(cfg.model, alone, NEW)).logits
    there = alone.segment_ids[0] != PADDING
    close(logits[0, NEW:][there], own[0][there])
    alone = without_images(prompts(cfg, [[]] * 4, ASKED[1:2] * 4))
    own = forward(cfg, params, alone).logits
    there = alone.segment_ids[0] != PADDING
    close(logits[1][there], own[0][there])


def encoder_of_tiles() -> Experiment:
    """An encoder that reads all tiles of an image together, as that of Llama 3.2 Vision."""
    tiled = {"tiles": 2, "tile_layouts": ((1, 1), (1, 2), (2, 1)), "num_global_layers": 1}
    vision = replace(tiny().vision, class_token=True, keep_class_token=True, pre_norm=True, **tiled)
    return tiny("cross_attention", vision=vision)


# Image tokens in the sequence, in the memory, and views in both.
SHARING = {
    "unified": EXPERIMENTS["unified"],
    "hybrid": EXPERIMENTS["hybrid"],
    "encoder_of_tiles": encoder_of_tiles(),
}


@pytest.mark.parametrize("cfg", SHARING.values(), ids=SHARING)
def test_prompts_that_share_images_read_what_they_read_with_their_own(cfg, forward, random_params):
    images, owners, params = pictures(cfg, (1, 0, 1)), [2, 0, 2, 1], random_params(cfg)
    own = prompts(cfg, [images[row] for row in owners], ASKED)
    shared = prompts(cfg, images, ASKED, image_rows=owners)
    assert (len(own.images), len(shared.images)) == (4, 3)
    own_logits = forward(cfg, params, own).logits
    close(forward(cfg, params, shared).logits, own_logits)
    swapped = shared.replace(image_rows=np.array([0, 2, 2, 1], np.int32))
    assert differ(forward(cfg, params, swapped).logits[:2, -1], own_logits[:2, -1])


def test_a_second_batch_of_the_same_shape_compiles_nothing(forward, random_params):
    cfg = tiny()
    forward(cfg, random_params(cfg), random_batch(cfg, seed=1))
    compiled = forward.compiled_programs()
    forward(cfg, random_params(cfg), random_batch(cfg, seed=2))
    assert forward.compiled_programs() == compiled
