"""The whole model: what may reach a token's logits and what may not, for every fusion style."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.linen import meta

from tests.nn.models import (
    EXPERIMENTS,
    Letters,
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
from vlm_jax.data import questions
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


def documents(cfg):
    """One row of two documents with an image each, and the two rows that hold one of them each."""
    one, two = rows(cfg, [pair()]), rows(cfg, [pair(seed=1)], seed=1)

    def joined(a, b):
        return np.concatenate([a, b], axis=1)

    is_image, views = two.image_token_index >= 0, cfg.vision.views
    moved = two.image_token_index + views * cfg.image_tokens
    fields = {
        name: joined(getattr(one, name), getattr(two, name))
        for name in ("tokens", "positions", "branch_ids")
    }
    both = Batch(
        **fields,
        segment_ids=joined(one.segment_ids, 2 * two.segment_ids),
        image_token_index=joined(
            one.image_token_index, np.where(is_image, moved, two.image_token_index)
        ),
        image_mask=joined(
            np.pad(one.image_mask, ((0, 0), (0, 0), (0, views))),
            np.pad(two.image_mask, ((0, 0), (0, 0), (views, 0))),
        ),
        images=joined(one.images, two.images),
    )
    alone = jax.tree.map(lambda *x: np.concatenate(x), one, two, one, two)
    return both, alone


@every_style
def test_two_images_in_a_row_are_two_rows(cfg, forward, random_params):
    both, alone = documents(cfg)
    params, there = random_params(cfg), both.segment_ids[0] != PADDING
    logits = forward(cfg, params, both).logits[0]
    close(logits[there], forward(cfg, params, alone).logits[:2].reshape(logits.shape)[there])


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
    gates = list(gates_of(meta.unbox(initializer(cfg)(jax.random.key(0)))).values())
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


@with_memory
def test_a_row_that_reads_no_image_is_text_only_even_with_open_gates(cfg, forward, random_params):
    batch, params = random_batch(cfg), random_params(cfg)
    alone = forward(cfg, params, without_images(batch)).logits
    blind = batch.replace(image_mask=np.zeros_like(batch.image_mask))
    np.testing.assert_allclose(forward(cfg, params, blind).logits, alone, rtol=1e-5, atol=1e-5)
    there = batch.segment_ids != PADDING
    assert differ(forward(cfg, params, batch).logits[there], alone[there])


@with_memory
def test_a_token_reads_only_the_images_of_its_mask(cfg, forward, random_params):
    batch, params = prompts(cfg, (2,), ("which one?",)), random_params(cfg)
    first = np.arange(batch.tokens.shape[1]) < 4
    batch = batch.replace(image_mask=batch.image_mask & np.stack([first, ~first], axis=-1))
    batch = batch.replace(
        branch_ids=np.where(first, 1, 2)[None].astype(np.int32)
    )  # what it read, it tells no other
    other = batch.replace(images=batch.images * np.array([1, -1], np.float32)[:, None, None, None])
    logits, changed = (np.asarray(forward(cfg, params, b).logits[0]) for b in (batch, other))
    np.testing.assert_allclose(changed[first], logits[first], rtol=1e-5, atol=1e-5)
    assert differ(changed[~first], logits[~first])


# Caches and batches


@every_style
def test_cached_is_uncached_and_compiled_once(cfg, forward, random_params):
    """Left-padded prompts of two lengths; three tokens follow one at a time."""
    new, params = 3, random_params(cfg)
    whole = prompts(cfg)
    length = whole.tokens.shape[1] - new
    text_fields = whole.replace(images=None)
    prompt = jax.tree.map(lambda x: x[:, :length], text_fields).replace(images=whole.images)
    out = forward(cfg, params, prompt, empty_cache(cfg.model, prompt, new))
    logits = [out.logits]
    for i in range(new):
        token = jax.tree.map(lambda x, at=length + i: x[:, at : at + 1], text_fields)
        out = forward(cfg, params, token, out.cache)
        logits.append(out.logits)
        compiled = forward._cache_size() if i == 0 else compiled
    assert forward._cache_size() == compiled
    there = whole.segment_ids != PADDING
    close(jnp.concatenate(logits, axis=1)[there], forward(cfg, params, whole).logits[there])


@every_style
def test_a_batch_of_mixed_lengths_and_image_counts_is_one_by_one(cfg, forward, random_params):
    batch, params = prompts(cfg), random_params(cfg)
    logits = forward(cfg, params, batch).logits
    for i, (images, question) in enumerate(zip(pictures(cfg), ["two?", "no image at all?"])):
        alone = questions.prompt_batch(cfg, Letters(), [images], [question])
        close(logits[i, -alone.tokens.shape[1] :], forward(cfg, params, alone).logits[0])


def encoder_of_tiles() -> Experiment:
    """An encoder that reads all tiles of an image together, as that of Llama 3.2 Vision."""
    tiled = {"tiles": 2, "tile_layouts": ((1, 1), (1, 2), (2, 1)), "num_global_layers": 1}
    vision = replace(tiny().vision, class_token=True, keep_class_token=True, pre_norm=True, **tiled)
    return tiny("cross_attention", vision=vision)


@pytest.mark.parametrize(
    "cfg", [*EXPERIMENTS.values(), encoder_of_tiles()], ids=[*EXPERIMENTS, "encoder_of_tiles"]
)
def test_prompts_that_share_images_read_what_they_read_with_their_own(cfg, forward, random_params):
    images, owners, asked = (
        pictures(cfg, (1, 2, 1)),
        [2, 0, 2, 1],
        ["two?", "one?", "no image at all?", "and here?"],
    )
    own = questions.prompt_batch(cfg, Letters(), [images[row] for row in owners], asked)
    shared, params = (
        questions.prompt_batch(cfg, Letters(), images, asked, image_rows=owners),
        random_params(cfg),
    )
    assert (len(own.images), len(shared.images)) == (4, 3)
    close(forward(cfg, params, shared).logits, forward(cfg, params, own).logits)
    swapped = shared.replace(image_rows=np.array([0, 2, 2, 1], np.int32))
    assert differ(
        forward(cfg, params, swapped).logits[:2, -1], forward(cfg, params, own).logits[:2, -1]
    )


def test_a_second_batch_of_the_same_shape_compiles_nothing(forward, random_params):
    cfg = tiny()
    forward(cfg, random_params(cfg), random_batch(cfg, seed=1))
    compiled = forward._cache_size()
    forward(cfg, random_params(cfg), random_batch(cfg, seed=2))
    assert forward._cache_size() == compiled
