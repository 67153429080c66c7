"""As `small.py`, with pictures in their own shape: at most 64 patches each, four to a token.

`--fusion.kind cross_attention` or `hybrid` chooses another fusion: docs/native_resolution.md.
"""

from dataclasses import replace

from configs.your_data import small
from vlm_jax.config import Experiment, PatchRope


def get_config() -> Experiment:
    cfg = small.get_config()
    vision = replace(
        cfg.vision,
        max_patches=64,
        patch_square=2,  # the projector merges 2 x 2 patches
        positions="none",
        rope=PatchRope("same"),
    )
    return replace(cfg, vision=vision)
