"""Hybrid fusion on generated pages of 128 px.

The thumbnail is in the sequence, four tiles of 64 px are in cross-attention.
"""

from dataclasses import replace

from configs.synthetic import glyphs_unified
from vlm_jax.config import Experiment, Fusion


def get_config() -> Experiment:
    unified = glyphs_unified.get_config()
    return replace(
        unified,
        data=replace(unified.data, image_px=128, text_length=144),
        vision=replace(unified.vision, tiles=4),
        fusion=Fusion(kind="hybrid"),
        eval=replace(unified.eval, max_new_tokens=36),  # six words of six tokens
    )
