"""DINOv3 ViT-L and Qwen3 0.6B: the thumbnail is in the sequence, four tiles are cross-attended.

Projector and cross-attention are trained. Weights: --vision.checkpoint DIR
--decoder.checkpoint DIR.
"""

from dataclasses import replace

from configs.composed import unified
from configs.published import dinov3_l16_olmo_2_1b
from vlm_jax.config import Experiment, Fusion


def get_config() -> Experiment:
    cfg = unified.get_config()
    return replace(
        cfg,
        vision=replace(dinov3_l16_olmo_2_1b.VISION, tiles=4),
        fusion=Fusion("hybrid", cross_every=4, gated=True),
    )
