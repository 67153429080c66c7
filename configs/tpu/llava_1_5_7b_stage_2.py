"""LLaVA 1.5, stage 2 (Liu et al. 2023, table 9): projector and decoder, on 665k conversations.

Starts from stage 1: --vision.checkpoint, --projector.checkpoint and --decoder.checkpoint name the
folder that `run.py export` wrote. For 64 chips of TPU v5e, see `experiments/plans/`.
"""

from dataclasses import replace

from configs.tpu import llava_1_5_7b_stage_1 as stage_1
from vlm_jax.config import Experiment, LrMult


def get_config() -> Experiment:
    cfg = stage_1.get_config()
    data = replace(
        cfg.data,
        files=("data/llava_instruct/llava_v1_5_mix665k.json",),
        image_dir="data/llava_instruct",
        template="vicuna",
        # Rows of 2048 tokens with the 576 tokens of an image.
        text_length=1472,
    )
    rates = LrMult(vision=0, projector=1, decoder=1)
    return replace(
        cfg,
        data=data,
        optim=replace(cfg.optim, learning_rate=2e-5, lr_mult=rates, warmup_steps=156),
        train=replace(cfg.train, steps=5200, batch_size=128),
    )
