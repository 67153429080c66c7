"""SigLIP 2 so400m and Qwen3 0.6B, image tokens in the sequence: aligned on LLaVA's captions.

Only the projector is trained, as in stage 1 of LLaVA (Liu et al. 2023). The other configs of this
folder differ in encoder, decoder and fusion. Weights: --vision.checkpoint DIR
--decoder.checkpoint DIR.
"""

from dataclasses import replace

from configs.published import siglip2_so400m_qwen3_0_6b
from vlm_jax.config import Data, Experiment, LrMult, Optim, Train

DATA = Data(
    source="conversations",
    files=("data/llava_pretrain/blip_laion_cc_sbu_558k.json",),
    image_dir="data/llava_pretrain/images",
    template="caption",
    text_length=128,
    augment=(),
)
OPTIM = Optim(
    learning_rate=1e-3,
    lr_mult=LrMult(vision=0, projector=1, decoder=0),
    warmup_steps=65,
    beta2=0.999,
    weight_decay=0.0,
)


def get_config() -> Experiment:
    return replace(
        siglip2_so400m_qwen3_0_6b.get_config(),
        data=DATA,
        optim=OPTIM,
        train=Train(steps=2180, batch_size=256, microbatches=8, compute_dtype="bfloat16"),
    )
