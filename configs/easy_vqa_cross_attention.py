"""Cross-modality attention (method B) on easy-VQA: cross-attention before every block reads the image tokens."""

from dataclasses import replace

import easy_vqa_unified

from vlm_jax.config import Experiment, Fusion


def get_config() -> Experiment:
    return replace(easy_vqa_unified.get_config(), fusion=Fusion(kind="cross_attention"))
