"""Transfer of PaliGemma at 224 px (Beyer et al. 2024, section 3.2.4) to questions of VQAv2.

All parts are trained, with the settings of big_vision's `proj/paligemma/transfers/vqav2.py`: ten
epochs, of which 5 % are warm-up. Starts from PaliGemma: --vision.checkpoint, --projector.checkpoint
and --decoder.checkpoint name its folder. The data file has the questions in LLaVA's format. For 256
chips of TPU v5e, see `experiments/plans/`.
"""

from dataclasses import replace

from configs.published import paligemma_3b_224
from vlm_jax.config import (
    Data,
    Experiment,
    Mesh,
    Optim,
    Train,
)

DATA = Data(
    source="conversations",
    files=("data/vqav2/train.json",),
    image_dir="data/coco/train2014",
    text_length=64,
    augment=(),
    special_ids=(0, 257_152, 108, 1),
    bos_id=2,
)


def get_config() -> Experiment:
    cfg = paligemma_3b_224.get_config()
    return replace(
        cfg,
        data=DATA,
        vision=replace(cfg.vision, remat="dots"),
        decoder=replace(cfg.decoder, remat="dots"),
        # big_vision subtracts 1e-6 of a weight per step; here weight decay is scaled by the rate.
        optim=Optim(learning_rate=1e-5, warmup_steps=865, beta2=0.999, weight_decay=0.1),
        train=Train(steps=17_300, batch_size=256, compute_dtype="bfloat16"),
        # The encoder's width of 1152 is not a multiple of 256 devices.
        mesh=Mesh(data=-1, fsdp=16),
    )
