"""Tags of tiles: without them cross-attention cannot know which tile is which.

After NVLM (Dai et al. 2024, arXiv 2409.11402, tables 1 and 2). Without tags and thumbnail, tiles
are exchangeable for cross-attention, and not for `unified`, which has them in an order
(`tests/nn/test_tiled_images.py`). Pages of 64 px are cut into four tiles. The decoder is
pretrained; the encoder is new, because it encodes tiles of 32 px. The tokenizer is the decoder's:
tags are four of its bytes that no page has.
"""

from experiments.settings import CROSS_ATTENTION, NEW_ENCODER, QUICK, base, prerequisites
from vlm_jax.study import Contrast, Study

TILES = {"vision.image_size_px": 32, "vision.tiles": 4, "vision.thumbnail": False}
NO_TAGS = {"vision.tile_tags": "none"}
IN_CROSS = "cross_none - cross_tags"
IN_UNIFIED = "unified_none - unified_tags"


def get_study() -> Study:
    arms = {
        "unified_tags": TILES,
        "unified_none": TILES | NO_TAGS,
        "cross_tags": TILES | CROSS_ATTENTION,
        "cross_none": TILES | CROSS_ATTENTION | NO_TAGS,
    }
    return Study(
        question="Do tags that name the tiles help cross-attention, and more than unified?",
        base=base({"vision.checkpoint": "", "train.steps": 600}),
        arms=arms,
        matched={"examples": None},
        reference="cross_none",
        seeds=5,
        metric="nats",
        contrasts={
            "cross": Contrast(IN_CROSS, "> 0", "NVLM, table 1: DocVQA 75.4 to 80.9"),
            "unified": Contrast(IN_UNIFIED, "> 0", "NVLM, table 2: DocVQA 80.2 to 87.4"),
            "more_in_cross": Contrast(
                f"({IN_CROSS}) - ({IN_UNIFIED})",
                "> 0",
                "expected from the law; NVLM, tables 1 and 2: +5.5 and +7.2, not in their scores",
            ),
        },
        tune=dict.fromkeys(arms, NEW_ENCODER),
        prerequisites={"text": prerequisites()["text"]},
        loss_threshold=0.5,
        quick=QUICK,
    )
