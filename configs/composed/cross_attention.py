"""DINOv3 ViT-L and OLMo 2 1B, gated cross-attention before every fourth block.

Projector and cross-attention are trained; while the gates are closed, the decoder is OLMo 2.
Weights: --vision.checkpoint DIR --decoder.checkpoint DIR.
"""

from dataclasses import replace

from configs.composed import unified
from configs.published import dinov3_l16_olmo_2_1b
from vlm_jax.config import Experiment


def get_config() -> Experiment:
    cfg, parts = unified.get_config(), dinov3_l16_olmo_2_1b.get_config()
    return replace(
        cfg,
        vision=parts.vision,
        projector=parts.projector,
        fusion=parts.fusion,
        decoder=parts.decoder,
    )
