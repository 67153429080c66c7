"""LLaVA 1.5, stage 1 of two for TPU v5e:2x4: only the projector is trained, on captions.

As `configs/tpu/llava_1_5_7b_stage_1.py`, in more microbatches. `llava_1_5_7b.py` is stage 2.
"""

from dataclasses import replace

from configs.tpu import llava_1_5_7b_stage_1
from vlm_jax.config import Experiment


def get_config() -> Experiment:
    cfg = llava_1_5_7b_stage_1.get_config()
    return replace(cfg, train=replace(cfg.train, microbatches=8))
