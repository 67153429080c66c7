"""The masks of every fusion style, drawn for one training row: an image of four tokens, and two questions about it.

The first question is `q q a` (two tokens and an answer), the second `Q A`; a row of the picture is a query, a column a
key, 1 where the query sees the key.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.config import Data, Fusion, Projector
from vlm_jax.data import text
from vlm_jax.nn.fusion import fuse
from vlm_jax.structs import Batch
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
IMAGE = """
    q  1 1 1 1
    q  1 1 1 1
    a  1 1 1 1
    Q  1 1 1 1
    A  1 1 1 1
"""
PAIRS = [([10, 11], [12]), ([13], [14])]
STYLES = variants() | {"text_only": tiny(fusion=Fusion("text_only"), projector=Projector("linear"))}
DRAWN = {
    "unified": (UNIFIED, None),
    "encoder_free": (ENCODER_FREE, None),
    "cross_attention": (TEXT, IMAGE),
    "encoder_decoder": (TEXT, IMAGE),
    "text_only": (TEXT, None),
}


def picture(drawing: str) -> list[str]:
    """Lines of 1 and . without the letters in front."""
    return ["".join(line.split()[1:]) for line in drawing.strip().splitlines()]


def drawn(mask) -> list[str]:
    return ["".join(".1"[int(seen)] for seen in row) for row in np.asarray(mask)[0, 0]]


def stream_of(cfg, pairs):
    cfg = replace(cfg, data=Data(questions_per_row=len(pairs), text_length=sum(len(p) + len(a) for p, a in pairs)))
    row = text.pack_row(cfg, pairs)
    batch = Batch(**{name: jnp.asarray(values)[None] for name, values in row.items()})
    return fuse(cfg, jnp.zeros((1, cfg.row_length, 8)), jnp.zeros((1, 4, 8)), batch)


@pytest.mark.parametrize("style", DRAWN)
def test_the_masks_of_all_styles(style):
    sequence, memory = DRAWN[style]
    stream = stream_of(STYLES[style], PAIRS)
    assert drawn(stream.mask) == picture(sequence)
    assert (stream.memory_mask is None) == (memory is None)
    if memory is not None:
        assert drawn(stream.memory_mask) == picture(memory)


def test_the_mask_of_a_prefix_that_sees_all_of_itself():
    cfg = tiny(fusion=Fusion("unified", prefix="bidirectional"))
    assert drawn(stream_of(cfg, PAIRS[:1]).mask) == picture(PREFIX)
