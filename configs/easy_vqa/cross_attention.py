"""Cross-modality attention (method B) on easy-VQA: cross-attention before every block."""

from dataclasses import replace

from configs.easy_vqa import unified
from vlm_jax.config import Experiment, Fusion


def get_config() -> Experiment:
    return replace(unified.get_config(), fusion=Fusion(kind="cross_attention"))
