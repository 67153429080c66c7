"""How do score, memory and speed grow with image tokens?

Pages of 64, 128 and 224 px in tiles of 32 px and a thumbnail, letters always of one size: a larger page holds more.

The decoder is the small Gemma 3 of `freezing.py`, which begins to read sooner. Every size has a vocabulary with room
for the tags of its tiles, so that words are cut into as many learned tokens at each, and rows in which all questions
about a page have room, and no more: padding is no cost of the size.
"""

from configs.synthetic.glyphs_typewritten_unified import get_config
from experiments.freezing import GEMMA_3
from experiments.fusion import CROSS
from vlm_jax.study import Study, changed

SIZES = {64: (4, 130), 128: (16, 160), 224: (49, 176)}  # px: tiles, tokens of text
KINDS = {
    "unified": {},
    "cross_attention": {"fusion.kind": "cross_attention", **CROSS},
    "hybrid": {"fusion.kind": "hybrid", **CROSS},
}


def get_study() -> Study:
    base = get_config()
    fields = {
        **GEMMA_3,
        "eval.split": "test",
        "vision.image_size_px": 32,
        "eval.max_new_tokens": 56,  # the longest page has nine words
        "decoder.max_positions": 512,
        "train.batch_size": 16,
        "train.steps": 500,
    }
    return Study(
        question="How do score, memory and speed grow with image tokens?",
        base=changed(base, fields),
        arms={
            f"{kind}_{px}": {
                **fusion,
                "data.image_px": px,
                "vision.tiles": tiles,
                "data.text_length": length,
                "decoder.vocab_size": base.decoder.vocab_size + tiles + 1,
            }
            for px, (tiles, length) in SIZES.items()
            for kind, fusion in KINDS.items()
        },
        matched={"examples": ""},
        reference="unified_64",
        quick={"train.steps": 4, "data.images": (200, 50, 50), "eval.max_examples": 20},
    )
