"""How do score, memory and speed grow with image tokens?

Pages of 64, 128 and 224 px in tiles of 32 px and a thumbnail, letters always of one size: a larger page holds more.
"""

from configs.glyphs_typewritten_unified import get_config
from vlm_jax.study import Study, changed

TILES = {64: 4, 128: 16, 224: 49}
CROSS = {"fusion.gated": False, "fusion.qk_norm": True}  # as in `fusion.py`
KINDS = {
    "unified": {},
    "cross_attention": {"fusion.kind": "cross_attention", **CROSS},
    "hybrid": {"fusion.kind": "hybrid", **CROSS},
}


def get_study() -> Study:
    fields = {
        "eval.split": "test",
        "vision.image_size_px": 32,
        "data.text_length": 200,
        "eval.max_new_tokens": 56,  # the longest page has nine words
        "decoder.max_positions": 512,
        "decoder.vocab_size": 350,  # of which up to 50 are the tags of tiles
        "train.batch_size": 16,
        "train.steps": 500,
    }
    return Study(
        question="How do score, memory and speed grow with image tokens?",
        base=changed(get_config(), fields),
        arms={
            f"{kind}_{px}": {**fusion, "data.image_px": px, "vision.tiles": TILES[px]}
            for px in TILES
            for kind, fusion in KINDS.items()
        },
        matched={"examples": ""},
        reference="unified_64",
        quick={"train.steps": 4, "data.images": (200, 50, 50), "eval.max_examples": 20},
    )
