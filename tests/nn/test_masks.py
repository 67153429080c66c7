"""The masks of every fusion style, drawn for one training row.

The row has an image of four tokens, and two questions about it. An image that is cut into tiles
has at most three: two and their thumbnail, of one token each.

The first question is `q q a` (two tokens and an answer), the second `Q A`; a row of the picture is
a query, a column a key, 1 where the query attends to the key.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.config import Data, Fusion, Projector
from vlm_jax.data import text
from vlm_jax.nn.fusion import causal_pattern, fuse, self_attention_mask
from vlm_jax.structs import ONE_SEGMENT, Batch
from vlm_jax.testing import tiny, variants

UNIFIED = """
    i  1 . . . . . . . .
    i  1 1 . . . . . . .
    i  1 1 1 . . . . . .
    i  1 1 1 1 . . . . .
    q  1 1 1 1 1 . . . .
    q  1 1 1 1 1 1 . . .
    a  1 1 1 1 1 1 1 . .
    Q  1 1 1 1 . . . 1 .
    A  1 1 1 1 . . . 1 1
"""
ENCODER_FREE = """
    i  1 . . . . . . . . . .
    i  1 1 . . . . . . . . .
    n  1 1 1 . . . . . . . .
    i  1 1 1 1 . . . . . . .
    i  1 1 1 1 1 . . . . . .
    n  1 1 1 1 1 1 . . . . .
    q  1 1 1 1 1 1 1 . . . .
    q  1 1 1 1 1 1 1 1 . . .
    a  1 1 1 1 1 1 1 1 1 . .
    Q  1 1 1 1 1 1 . . . 1 .
    A  1 1 1 1 1 1 . . . 1 1
"""
TEXT = """
    q  1 . . . .
    q  1 1 . . .
    a  1 1 1 . .
    Q  . . . 1 .
    A  . . . 1 1
"""
PREFIX = """
    i  1 1 1 1 1 1 .
    i  1 1 1 1 1 1 .
    i  1 1 1 1 1 1 .
    i  1 1 1 1 1 1 .
    q  1 1 1 1 1 1 .
    q  1 1 1 1 1 1 .
    a  1 1 1 1 1 1 1
"""
UNIFIED_TILES = """
    1  1 . . . . . . . . . .
    i  1 1 . . . . . . . . .
    2  1 1 1 . . . . . . . .
    i  1 1 1 1 . . . . . . .
    T  1 1 1 1 1 . . . . . .
    i  1 1 1 1 1 1 . . . . .
    q  1 1 1 1 1 1 1 . . . .
    q  1 1 1 1 1 1 1 1 . . .
    a  1 1 1 1 1 1 1 1 1 . .
    Q  1 1 1 1 1 1 . . . 1 .
    A  1 1 1 1 1 1 . . . 1 1
"""
HYBRID_TILES = """
    1  1 . . . . . . . .
    2  1 1 . . . . . . .
    T  1 1 1 . . . . . .
    i  1 1 1 1 . . . . .
    q  1 1 1 1 1 . . . .
    q  1 1 1 1 1 1 . . .
    a  1 1 1 1 1 1 1 . .
    Q  1 1 1 1 . . . 1 .
    A  1 1 1 1 . . . 1 1
"""
TEXT_TILES = """
    1  1 . . . . . . .
    2  1 1 . . . . . .
    T  1 1 1 . . . . .
    q  1 1 1 1 . . . .
    q  1 1 1 1 1 . . .
    a  1 1 1 1 1 1 . .
    Q  1 1 1 . . . 1 .
    A  1 1 1 . . . 1 1
"""
MEMORY_HYBRID = """
    1  1 . .
    2  . 1 .
    T  . . .
    i  1 1 .
    q  1 1 .
    q  1 1 .
    a  1 1 .
    Q  1 1 .
    A  1 1 .
"""
MEMORY_TILES = """
    1  1 . . .
    2  . 1 . .
    T  . . . 1
    q  1 1 . 1
    q  1 1 . 1
    a  1 1 . 1
    Q  1 1 . 1
    A  1 1 . 1
"""
IMAGE = """
    q  1 1 1 1
    q  1 1 1 1
    a  1 1 1 1
    Q  1 1 1 1
    A  1 1 1 1
"""
IMAGE_TOO = "i 1 1 1 1\n" * 3 + "i 1 1 1 1"
PAIRS = [([10, 11], [12]), ([13], [14])]
STYLES = variants() | {"text_only": tiny(fusion=Fusion("text_only"), projector=Projector("linear"))}
DRAWN = {
    "unified": (UNIFIED, None),
    "encoder_free": (ENCODER_FREE, None),
    "cross_attention": (TEXT, IMAGE),
    "encoder_decoder": (TEXT, IMAGE),
    "hybrid": (UNIFIED, IMAGE_TOO + IMAGE),
    "text_only": (TEXT, None),
}
IN_TILES = {
    "unified": (UNIFIED_TILES, None),
    "cross_attention": (TEXT_TILES, MEMORY_TILES),
    "encoder_decoder": (TEXT_TILES, MEMORY_TILES),
    "hybrid": (HYBRID_TILES, MEMORY_HYBRID),
}


def picture(drawing: str) -> list[str]:
    """Lines of 1 and . without the letters in front."""
    return ["".join(line.split()[1:]) for line in drawing.strip().splitlines()]


def drawn(mask) -> list[str]:
    return ["".join(".1"[int(seen)] for seen in row) for row in np.asarray(mask)[0, 0]]


def batch_of(cfg, pairs):
    row = text.pack_row(cfg, pairs, min(cfg.vision.tiles, 2))
    return Batch(**{name: jnp.asarray(values)[None] for name, values in row.items()})


def stream_of(cfg, pairs):
    cfg = replace(
        cfg,
        data=Data(questions_per_row=len(pairs), text_length=sum(len(p) + len(a) for p, a in pairs)),
    )
    batch = batch_of(cfg, pairs)
    image = jnp.zeros((1, cfg.vision.views * cfg.image_tokens, 8))
    return fuse(cfg.model, jnp.zeros((1, cfg.row_length, 8)), image, batch)


@pytest.mark.parametrize("style", DRAWN)
def test_the_masks_of_all_styles(style):
    sequence, memory = DRAWN[style]
    stream = stream_of(STYLES[style], PAIRS)
    assert drawn(stream.mask) == picture(sequence)
    assert (stream.memory is None) == (memory is None)
    if memory is not None:
        # All of the only image, for tokens that have it.
        assert stream.memory_mask is None
        has_image = stream.has_image[:, None, :, None].repeat(stream.memory.shape[1], axis=3)
        assert drawn(has_image) == picture(memory)


def test_one_question_in_a_row_is_causal_without_branches():
    """Kernels then need no mask."""
    with_branches = batch_of(STYLES["unified"], PAIRS[:1])
    batch = with_branches.replace(branch_ids=None, layout=ONE_SEGMENT)
    mask = self_attention_mask(batch)
    np.testing.assert_array_equal(mask, self_attention_mask(with_branches))
    slots = np.arange(mask.shape[-1])
    is_token = slots < mask.any((0, 1, 2)).sum()
    causal = (slots[:, None] >= slots) & is_token[:, None] & is_token
    np.testing.assert_array_equal(mask[0, 0], causal)
    assert causal_pattern(batch).one_segment


def test_the_mask_of_a_prefix_that_sees_all_of_itself():
    cfg = tiny(fusion=Fusion("unified", prefix="bidirectional"))
    assert drawn(stream_of(cfg, PAIRS[:1]).mask) == picture(PREFIX)


def in_tiles(kind, **settings):
    """Three tiles of a token each at the most."""
    cfg = tiny(kind, projector=Projector("resampler", queries=1))
    return replace(cfg, vision=replace(cfg.vision, tiles=3, **settings))


@pytest.mark.parametrize("kind", IN_TILES)
def test_the_masks_of_an_image_in_tiles(kind):
    """A tag (1, 2; T: thumbnail) attends to its own tile, other tokens to every view."""
    cfg = in_tiles(kind)
    sequence, memory = IN_TILES[kind]
    stream = stream_of(cfg, PAIRS)
    there = len(picture(sequence))  # what is left is the room that a third tile would take
    assert [line[:there] for line in drawn(stream.mask)[:there]] == picture(sequence)
    assert not any("1" in line for line in drawn(stream.mask)[there:])
    if memory is None:
        assert stream.memory_mask is None
        return
    assert drawn(stream.memory_mask)[:there] == picture(memory)
    assert not any("1" in line for line in drawn(stream.memory_mask)[there:])
    assert stream.has_image[0].tolist() == ["1" in line for line in drawn(stream.memory_mask)]


@pytest.mark.parametrize("kind", IN_TILES)
def test_without_tags_every_token_reads_every_view(kind):
    stream, tagged = (stream_of(in_tiles(kind, tile_tags=tags), PAIRS) for tags in ("none", "1d"))
    assert tagged.x.shape[1] - stream.x.shape[1] == 4
    if stream.memory_mask is not None:
        memory = picture(IN_TILES[kind][1])
        untagged = [line for line in drawn(stream.memory_mask) if "1" in line]
        assert set(untagged) == {memory[-1]}
