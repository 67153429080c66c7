"""Hybrid fusion reading drawn pages of 128 px: a thumbnail in the sequence, four tiles of 64 px in cross-attention."""

from dataclasses import replace

import glyphs_unified

from vlm_jax.config import Experiment, Fusion


def get_config() -> Experiment:
    unified = glyphs_unified.get_config()
    data, vision = replace(unified.data, image_px=128), replace(unified.vision, tiles=4)
    return replace(unified, data=data, vision=vision, fusion=Fusion(kind="hybrid"))
