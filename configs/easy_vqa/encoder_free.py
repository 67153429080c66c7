"""No encoder (Fuyu) on easy-VQA: projected patches in the sequence.

A newline token follows every row of patches.
"""

from dataclasses import replace

from configs.easy_vqa import unified
from vlm_jax.config import Experiment, Projector


def get_config() -> Experiment:
    cfg = unified.get_config()
    vision = replace(cfg.vision, kind="none", newline_token=True)
    return replace(cfg, vision=vision, projector=Projector(kind="linear"))
