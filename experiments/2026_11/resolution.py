"""Growth of score, memory and speed with image tokens.

Pages of 64, 128 and 224 px in tiles of 32 px and a thumbnail. Letters have one size, so that a
larger page holds more words. The decoder is the small Gemma 3 of `freezing.py`, which starts to
read sooner. Padding should not add to the cost of a size: every size has rows just long enough for
all questions about a page. Its vocabulary has room for the tags of its tiles beside as many learned
tokens as at the other sizes.
"""

from configs.synthetic.glyphs_typewritten_unified import get_config
from experiments.settings import CROSS, CROSS_ATTENTION, GEMMA_3
from vlm_jax.study import Study, override

# Page size in px -> tiles, text tokens of a row.
SIZES = {64: (4, 130), 128: (16, 160), 224: (49, 176)}
KINDS = {
    "unified": {},
    "cross_attention": CROSS_ATTENTION,
    "hybrid": {"fusion.kind": "hybrid", **CROSS},
}


def get_study() -> Study:
    base = get_config()
    fields = {
        **GEMMA_3,
        "eval.split": "test",
        "vision.image_size_px": 32,
        # The longest page has nine words.
        "eval.max_new_tokens": 56,
        "decoder.max_positions": 512,
        "train.batch_size": 16,
        "train.steps": 500,
    }
    return Study(
        question="How do score, memory and speed grow with image tokens?",
        base=override(base, fields),
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
        matched={"examples": None},
        reference="unified_64",
        quick={"train.steps": 4, "data.images": (200, 50, 50), "eval.max_examples": 20},
    )
