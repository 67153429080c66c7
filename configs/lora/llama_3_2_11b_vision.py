"""LoRA of Llama 3.2 11B Vision, in all blocks and in cross-attention, for TPU v5e:2x4.

The projector is trained in full. Starts from `--checkpoint DIR`.
"""

from dataclasses import replace

from configs.tpu import llama_3_2_11b_vision_train
from vlm_jax.config import Experiment, Lora, LrMult


def get_config() -> Experiment:
    cfg = llama_3_2_11b_vision_train.get_config()
    return replace(
        cfg,
        lora=Lora(rank=16, alpha=32, targets=("decoder", "cross_attention")),
        optim=replace(cfg.optim, learning_rate=1e-4, lr_mult=LrMult(vision=0, projector=0.1)),
        train=replace(cfg.train, microbatches=16),
    )
