"""LoRA of LLaVA 1.5 7B on conversations, with the projector in full, for TPU v5e:2x4.

The authors' ranks and rates (`finetune_lora.sh` of LLaVA): rank 128, alpha 256, 2e-4, and a tenth
of it for the projector. Starts from `--checkpoint DIR`, or as stage 2 from the run of stage 1.
"""

from dataclasses import replace

from configs.tpu import llava_1_5_7b_stage_2
from vlm_jax.config import Experiment, Lora, LrMult


def get_config() -> Experiment:
    cfg = llava_1_5_7b_stage_2.get_config()
    rates = LrMult(vision=0, projector=0.1, decoder=1)
    return replace(
        cfg,
        lora=Lora(rank=128, alpha=256, targets=("decoder",)),
        optim=replace(cfg.optim, learning_rate=2e-4, lr_mult=rates),
        train=replace(cfg.train, microbatches=16),
    )
