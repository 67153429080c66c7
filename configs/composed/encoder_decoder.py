"""SigLIP 2 so400m and Gemma 3 1B, with cross-attention in every block.

Projector and cross-attention are trained. Weights: --vision.checkpoint DIR
--decoder.checkpoint DIR.
"""

from dataclasses import replace

from configs.composed import unified
from configs.published import gemma3_1b
from vlm_jax.config import Experiment, Fusion


def get_config() -> Experiment:
    cfg = unified.get_config()
    return replace(cfg, fusion=Fusion("encoder_decoder"), decoder=gemma3_1b.DECODER)
