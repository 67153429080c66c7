"""The masks of all fusion styles as pictures: rows are queries, columns are keys, 1: attends."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.config import Projector, Vision
from vlm_jax.nn.fusion import (
    causal_pattern,
    cross_attention_mask,
    fuse,
    insert_image_tokens,
    self_attention_mask,
    text_mask,
)
from vlm_jax.structs import ANY_LAYOUT, NO_IMAGE, PACKED, PADDING, Batch, Cache
from vlm_jax.testing import tiny

KINDS_WITH_MEMORY = ("cross_attention", "encoder_decoder")


def batch(segments, branches, reads=None, slots=None) -> Batch:
    """Returns one row; `reads` lists the images of each token, `slots` its image token."""
    ids = jnp.asarray([segments], jnp.int32)
    reads = jnp.zeros((1, len(segments), 0), bool) if reads is None else jnp.asarray([reads], bool)
    return Batch(
        tokens=ids,
        positions=ids,
        segment_ids=ids,
        branch_ids=jnp.asarray([branches], jnp.int32),
        image_token_index=jnp.full_like(ids, NO_IMAGE)
        if slots is None
        else jnp.asarray([slots], jnp.int32),
        image_mask=reads,
    )


def cache(index, segments, branches) -> Cache:
    positions = jnp.arange(len(segments))[None]
    return Cache(
        jnp.int32(index), jnp.asarray([segments]), jnp.asarray([branches]), positions, None, []
    )


def drawn(mask):
    """(1, 1, S, T) bool -> lines of 1 and ."""
    assert mask.shape[:2] == (1, 1)
    return ["".join(row) for row in np.where(mask[0, 0], "1", ".")]


def picture(text):
    return [line.replace(" ", "") for line in text.strip().splitlines()]


def two_tokens_an_image(kind):
    return tiny(
        kind,
        vision=Vision(image_size_px=16, patch_size_px=8),
        projector=Projector("resampler", queries=2),
    )


def stream(kind, row, image_rows):
    """Returns the decoder's inputs of a row whose images have two tokens each, of width 3."""
    text = jnp.zeros((*row.tokens.shape, 3))
    return fuse(two_tokens_an_image(kind).model, text, jnp.ones((1, image_rows, 3)), row)


def test_unified_two_questions_about_one_image():
    """i i | q q a | q a | padding: the image is the trunk, a question attends to it and itself."""
    row = batch(
        [1, 1, 1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 2, 2, 0],
        [[1]] * 7 + [[0]],
        [0, 1, -1, -1, -1, -1, -1, -1],
    )
    seen = stream("unified", row, 2)
    assert drawn(seen.mask) == picture("""
        1 . . . . . . .
        1 1 . . . . . .
        1 1 1 . . . . .
        1 1 1 1 . . . .
        1 1 1 1 1 . . .
        1 1 . . . 1 . .
        1 1 . . . 1 1 .
        . . . . . . . .
    """)
    assert seen.memory is None
    assert seen.memory_mask is None
    assert seen.x[0, :, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("kind", KINDS_WITH_MEMORY)
def test_with_a_memory_two_questions_about_one_image(kind):
    """q q a | q a | padding: no trunk; every question attends to the whole image in memory."""
    row = batch([1, 1, 1, 1, 1, 0], [1, 1, 1, 2, 2, 0], [[1]] * 5 + [[0]])
    seen = stream(kind, row, 2)
    assert drawn(seen.mask) == picture("""
        1 . . . . .
        1 1 . . . .
        1 1 1 . . .
        . . . 1 . .
        . . . 1 1 .
        . . . . . .
    """)
    assert seen.memory_mask is None  # the image is whole, or hidden from a token
    assert drawn(seen.has_image[:, None, None]) == picture("1 1 1 1 1 .")
    assert seen.memory.shape == (1, 2, 3)
    assert not seen.x.any()


@pytest.mark.parametrize("kind", KINDS_WITH_MEMORY)
def test_with_a_memory_two_documents_with_an_image_each_and_one_without(kind):
    row = batch([1, 1, 2, 2, 3], [0, 0, 0, 0, 0], [[1, 0], [1, 0], [0, 1], [0, 1], [0, 0]])
    seen = stream(kind, row, 4)
    assert drawn(seen.mask) == picture("""
        1 . . . .
        1 1 . . .
        . . 1 . .
        . . 1 1 .
        . . . . 1
    """)
    assert drawn(seen.memory_mask) == picture("""
        1 1 . .
        1 1 . .
        . . 1 1
        . . 1 1
        . . . .
    """)


def test_unified_two_documents_with_an_image_each():
    """i i t | i i t: neither text attends to the other's image."""
    row = batch(
        [1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0], [[1, 0]] * 3 + [[0, 1]] * 3, [0, 1, -1, 2, 3, -1]
    )
    assert drawn(stream("unified", row, 4).mask) == picture("""
        1 . . . . .
        1 1 . . . .
        1 1 1 . . .
        . . . 1 . .
        . . . 1 1 .
        . . . 1 1 1
    """)


def test_a_packed_row_of_segments_with_branches():
    """The drawing of `self_attention_mask`: a trunk with two branches, and a second segment."""
    assert drawn(
        self_attention_mask(batch([1, 1, 1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 0, 0]))
    ) == picture("""
        1 . . . . . . .
        1 1 . . . . . .
        1 1 1 . . . . .
        1 1 1 1 . . . .
        1 1 . . 1 . . .
        1 1 . . 1 1 . .
        . . . . . . 1 .
        . . . . . . 1 1
    """)


def test_equal_branches_of_different_segments_do_not_see_each_other():
    assert drawn(self_attention_mask(batch([1, 1, 2, 2], [0, 1, 0, 1]))) == picture("""
        1 . . .
        1 1 . .
        . . 1 .
        . . 1 1
    """)


def test_a_left_padded_prompt_goes_into_the_cache():
    """Two slots of padding, a trunk of one and a branch of two, and two slots to come."""
    prompt = batch([0, 0, 1, 1, 1], [0, 0, 0, 1, 1])
    assert drawn(
        self_attention_mask(prompt, cache(0, [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]))
    ) == picture("""
        . . . . . . .
        . . . . . . .
        . . 1 . . . .
        . . 1 1 . . .
        . . 1 1 1 . .
    """)


@pytest.mark.parametrize("index, seen", [(5, ". . 1 1 1 1 ."), (6, ". . 1 1 1 1 1")])
def test_a_decoded_token_sees_the_prompt_and_what_was_decoded(index, seen):
    slots = cache(index, [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1])
    assert drawn(self_attention_mask(batch([1], [1]), slots)) == picture(seen)


def test_several_tokens_at_once_go_into_the_cache():
    assert drawn(
        self_attention_mask(batch([1, 1], [1, 1]), cache(2, [0, 1, 1, 1, 1], [0, 0, 1, 1, 1]))
    ) == picture("""
        . 1 1 . .
        . 1 1 1 .
    """)


def test_memory_mask_repeats_each_image_for_all_its_tokens():
    row = batch([1, 1, 1], [0, 0, 0], [[1, 0], [0, 1], [1, 1]])
    assert drawn(cross_attention_mask(row, 3)) == picture("""
        1 1 1 . . .
        . . . 1 1 1
        1 1 1 1 1 1
    """)


@pytest.mark.parametrize("kind", KINDS_WITH_MEMORY)
def test_a_row_without_images_has_no_memory(kind):
    row = batch([1, 1], [0, 0])
    seen = fuse(two_tokens_an_image(kind).model, jnp.zeros((1, 2, 3)), None, row)
    assert seen.memory is None
    assert seen.memory_mask is None


@pytest.mark.parametrize("kind", KINDS_WITH_MEMORY)
def test_while_decoding_the_mask_of_the_memory_stays_when_the_images_are_gone(kind):
    row = batch([1], [1], [[0, 1]])
    seen = fuse(
        two_tokens_an_image(kind).model, jnp.zeros((1, 1, 3)), None, row, cache(1, [1, 1], [1, 1])
    )
    assert seen.memory is None
    assert drawn(seen.memory_mask) == [". . 1 1".replace(" ", "")]


def test_tokens_of_a_block_see_each_other_and_what_follows_sees_them():
    """The prefix of PaliGemma: image and prompt are one block, followed by the answer."""
    row = batch([1] * 5, [0] * 5).replace(block_ids=jnp.asarray([[1, 1, 1, 0, 0]]))
    assert drawn(self_attention_mask(row)) == picture("""
        1 1 1 . .
        1 1 1 . .
        1 1 1 . .
        1 1 1 1 .
        1 1 1 1 1
    """)


def test_a_block_reaches_into_a_branch_but_not_into_another_segment():
    """An image on the trunk and a question on its branch are one block, without a mask."""
    row = batch([1, 1, 1, 2], [0, 1, 1, 0]).replace(block_ids=jnp.asarray([[1, 1, 0, 1]]))
    assert drawn(self_attention_mask(row)) == picture("""
        1 1 . .
        1 1 . .
        1 1 1 .
        . . . 1
    """)


def test_a_block_is_seen_whole_through_a_sliding_window():
    """The sliding layers of PaliGemma 2: the window does not apply within the prefix."""
    row = batch([1] * 6, [0] * 6).replace(
        positions=jnp.arange(6)[None], block_ids=jnp.asarray([[1, 1, 1, 1, 0, 0]])
    )
    assert drawn(self_attention_mask(row, window=3)) == picture("""
        1 1 1 1 . .
        1 1 1 1 . .
        1 1 1 1 . .
        1 1 1 1 . .
        . . 1 1 1 .
        . . . 1 1 1
    """)


def test_a_window_may_also_limit_a_block():
    """The sliding layers of Gemma 3: an image of four tokens and a window of three."""
    row = batch([1] * 6, [0] * 6).replace(
        positions=jnp.arange(6)[None], block_ids=jnp.asarray([[0, 1, 1, 1, 1, 0]])
    )
    assert drawn(self_attention_mask(row, window=3, limits_blocks=True)) == picture("""
        1 . . . . .
        1 1 1 1 1 .
        1 1 1 1 1 .
        . 1 1 1 1 .
        . . 1 1 1 .
        . . . 1 1 1
    """)


def test_a_sliding_window_counts_positions_and_so_leaves_packed_questions_alone():
    """Two questions about a trunk of two: the second window reaches the trunk past the first."""
    row = batch([1] * 6, [0, 0, 1, 1, 2, 2]).replace(positions=jnp.asarray([[0, 1, 2, 3, 2, 3]]))
    assert drawn(self_attention_mask(row, window=3)) == picture("""
        1 . . . . .
        1 1 . . . .
        1 1 1 . . .
        . 1 1 1 . .
        1 1 . . 1 .
        . 1 . . 1 1
    """)


def test_a_text_alone_is_seen_up_to_the_token_or_whole_and_never_its_padding():
    is_token = jnp.array([[1, 1, 1, 0]]) > 0
    assert drawn(text_mask(is_token, causal=True)) == picture("""
        1 . . .
        1 1 . .
        1 1 1 .
        1 1 1 .
    """)
    assert drawn(text_mask(is_token, causal=False)) == picture("1 1 1 .")


def test_a_blind_token_reads_everything_where_asked_for_and_is_known_as_blind():
    row = batch([1, 1], [0, 0], [[1, 0], [0, 0]])
    cfg = two_tokens_an_image("cross_attention")
    image = jnp.zeros((1, 4, 3))
    skipping = fuse(cfg.model, jnp.zeros((1, 2, 3)), image, row)
    opened = fuse(
        replace(cfg, fusion=replace(cfg.fusion, tokens_without_image="attend_all")).model,
        jnp.zeros((1, 2, 3)),
        image,
        row,
    )
    assert drawn(skipping.memory_mask) == ["11..", "...."]
    assert drawn(opened.memory_mask) == ["11..", "1111"]
    for stream in (skipping, opened):
        assert stream.has_image.tolist() == [[True, False]]
    assert opened.attends.tolist() == [[True, True]]


def test_a_blind_token_reads_what_its_blind_mask_allows():
    row = batch([1, 1, 1], [0, 0, 0], [[1, 0], [0, 0], [0, 0]])
    row = row.replace(no_image_mask=jnp.asarray([[[0, 1], [0, 1], [0, 0]]], bool))
    cfg = two_tokens_an_image("cross_attention")
    cfg = replace(cfg, fusion=replace(cfg.fusion, tokens_without_image="attend_all"))
    stream = fuse(cfg.model, jnp.zeros((1, 3, 3)), jnp.zeros((1, 4, 3)), row)
    assert drawn(stream.memory_mask) == ["11..", "..11", "...."]
    assert stream.has_image.tolist() == [[True, False, False]]
    assert stream.attends.tolist() == [[True, True, False]]


def test_place_puts_image_tokens_where_they_stand_and_leaves_the_text():
    text = jnp.asarray([[[1.0], [2.0], [3.0], [4.0]]])
    image = jnp.asarray([[[-10.0], [-11.0], [-12.0]]])
    placed = insert_image_tokens(text, image, jnp.asarray([[NO_IMAGE, 0, 2, NO_IMAGE]]))
    assert placed[0, :, 0].tolist() == [1, -10, -12, 4]


def test_place_keeps_rows_apart():
    text, image = jnp.zeros((2, 1, 1)), jnp.asarray([[[1.0]], [[2.0]]])
    assert insert_image_tokens(text, image, jnp.asarray([[0], [0]]))[:, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize(
    "branches, blocks, has_cache, layout, window",
    [
        (None, None, False, ANY_LAYOUT, None),
        (None, None, False, PACKED, 2),
        ([0] * 6, None, False, PACKED, None),
        (None, [1] * 6, False, PACKED, None),
        (None, None, True, PACKED, None),
        (None, None, False, ANY_LAYOUT, 2),
    ],
)
def test_a_pattern_stands_for_the_mask_only_if_it_is_all_of_it(
    branches, blocks, has_cache, layout, window
):
    segments = [1, 1, 2, 2, 2, 0]
    row = batch(segments, [0] * 6).replace(
        layout=layout,
        positions=jnp.asarray([[0, 1, 0, 1, 2, 0]]),
        branch_ids=None if branches is None else jnp.asarray([branches]),
        block_ids=None if blocks is None else jnp.asarray([blocks]),
    )
    pattern = causal_pattern(row, cache(0, segments, [0] * 6) if has_cache else None, window)
    if branches or blocks or has_cache or (window and layout == ANY_LAYOUT):
        assert pattern is None
        return
    assert not pattern.one_segment
    (ids,) = pattern.segments
    distance = np.arange(6)[:, None] - np.arange(6)
    in_window = (distance >= 0) & (distance < (pattern.window or 6))
    expected = in_window & (ids[:, None] == ids) & (np.asarray(segments) != PADDING)
    np.testing.assert_array_equal(self_attention_mask(row, window=window)[0, 0], expected)
