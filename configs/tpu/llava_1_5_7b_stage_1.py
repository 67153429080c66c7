"""LLaVA 1.5, stage 1 (Liu et al. 2023, table 9): only the projector is trained, on 558k captions.

Starts from --vision.checkpoint and --decoder.checkpoint; the data is the authors' `LLaVA-Pretrain`.
For 64 chips of TPU v5e, see `experiments/plans/`.
"""

from dataclasses import replace

from configs.published import llava_1_5_7b
from vlm_jax.config import (
    Data,
    Experiment,
    LrMult,
    Mesh,
    Optim,
    Train,
)

DATA = Data(
    source="conversations",
    files=("data/llava_pretrain/blip_laion_cc_sbu_558k.json",),
    image_dir="data/llava_pretrain/images",
    template="caption",
    text_length=128,
    augment=(),
    special_ids=(32_001, 32_000, 32_002, 2),
    bos_id=1,
)


def get_config() -> Experiment:
    cfg = llava_1_5_7b.get_config()
    return replace(
        cfg,
        data=DATA,
        decoder=replace(cfg.decoder, remat="dots"),
        optim=Optim(
            learning_rate=1e-3,
            lr_mult=LrMult(vision=0, projector=1, decoder=0),
            warmup_steps=65,  # 3 %
            beta2=0.999,
            weight_decay=0.0,
        ),
        train=Train(steps=2180, batch_size=256, compute_dtype="bfloat16"),
        mesh=Mesh(data=1, fsdp=-1),
    )
