"""LoRA of PaliGemma at 224 px on questions of VQAv2, with the projector in full, for v5e:2x4.

Data and steps are as in `configs/tpu/paligemma_3b_224_transfer.py`. Starts from `--checkpoint DIR`.
"""

from dataclasses import replace

from configs.tpu import paligemma_3b_224_transfer
from vlm_jax.config import Experiment, Lora, LrMult, Mesh


def get_config() -> Experiment:
    cfg = paligemma_3b_224_transfer.get_config()
    return replace(
        cfg,
        lora=Lora(rank=16, alpha=32, targets=("decoder",)),
        optim=replace(cfg.optim, learning_rate=2e-4, lr_mult=LrMult(vision=0, projector=0.1)),
        train=replace(cfg.train, microbatches=4),
        mesh=Mesh(data=1, fsdp=-1),
    )
