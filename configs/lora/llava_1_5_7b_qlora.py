"""LLaVA 1.5 7B on one chip of TPU v5e, 16 GiB: LoRA beside kernels in 4 bits (QLoRA).

Starts from the published model: `--checkpoint` names its folder, and `--data.files` and
`--data.image_dir` your conversations. Rates are of the authors' fine-tuning with LoRA; rank, alpha
and dropout of QLoRA (Dettmers et al. 2023, appendix B).
"""

from dataclasses import replace

from configs.tpu import llava_1_5_7b_stage_2 as stage_2
from vlm_jax.config import Experiment, Lora, LrMult, Mesh


def get_config() -> Experiment:
    cfg = stage_2.get_config()
    rates = LrMult(vision=0, projector=0.1, decoder=1)
    return replace(
        cfg,
        decoder=replace(cfg.decoder, remat="full"),
        lora=Lora(rank=64, alpha=16, dropout=0.1),
        optim=replace(cfg.optim, learning_rate=2e-4, lr_mult=rates, warmup_steps=30),
        train=replace(cfg.train, steps=1000, batch_size=16, microbatches=16, frozen_dtype="nf4"),
        mesh=Mesh(),
    )
