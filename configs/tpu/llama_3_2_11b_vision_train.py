"""Training of Llama 3.2 11B Vision with a frozen language model.

Vision, projector and cross-attention are trained, as in the original (Dubey et al. 2024, section
7.4), from --vision.checkpoint and --decoder.checkpoint. For 64 chips of TPU v5p, see
`experiments/plans/`.
"""

from dataclasses import replace

from configs.published import llama_3_2_11b_vision
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
    files=("data/llava_instruct/llava_v1_5_mix665k.json",),
    image_dir="data/llava_instruct",
    text_length=2048,
    augment=(),
    special_ids=(128_004, 128_256, 128_002, 128_001),
    bos_id=128_000,
)


def get_config() -> Experiment:
    cfg = llama_3_2_11b_vision.get_config()
    return replace(
        cfg,
        data=DATA,
        vision=replace(cfg.vision, remat="dots"),
        fusion=replace(cfg.fusion, tokens_without_image="mask_out"),
        decoder=replace(cfg.decoder, remat="dots"),
        optim=Optim(
            learning_rate=1e-5, lr_mult=LrMult(decoder=0), warmup_steps=200, weight_decay=0.0
        ),
        train=Train(steps=5200, batch_size=128, compute_dtype="bfloat16"),
        mesh=Mesh(data=1, fsdp=-1),
    )
