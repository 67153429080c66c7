"""LoRA of LLaVA 1.5 7B as `llava_1_5_7b.py`, on one GPU of 80 GB, such as an H100."""

from dataclasses import replace

from configs.lora import llava_1_5_7b
from vlm_jax.config import Experiment


def get_config() -> Experiment:
    cfg = llava_1_5_7b.get_config()
    # Four rows at once.
    return replace(cfg, train=replace(cfg.train, microbatches=32))
