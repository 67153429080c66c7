"""Encoder-decoder on easy-VQA: every block is self-attention, cross-attention to the image tokens, MLP."""

from dataclasses import replace

import easy_vqa_unified

from vlm_jax.config import Experiment, Fusion


def get_config() -> Experiment:
    return replace(easy_vqa_unified.get_config(), fusion=Fusion(kind="encoder_decoder"))
