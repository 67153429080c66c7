"""No encoder (Fuyu style) on easy-VQA: projected patches stand in the sequence, a newline token after every row."""

from dataclasses import replace

import easy_vqa_unified

from vlm_jax.config import Experiment, Projector


def get_config() -> Experiment:
    unified = easy_vqa_unified.get_config()
    vision = replace(unified.vision, kind="none", newline_token=True)
    return replace(unified, vision=vision, projector=Projector(kind="linear"))
