"""Resolution and the number of image tokens, on the same pages.

After MM1 (McKinzie et al. 2024, arXiv 2403.09611, section 3.2), PaliGemma (Beyer et al. 2024, arXiv
2407.07726), NVLM (Dai et al. 2024, table 2) and CASA (2025, arXiv 2512.19535, table 5b). Pages of
64 px are encoded at that size or at 32 px, always in 64 patches, of which 4 or 16 become one token:
two letters or eight. The decoder is pretrained; the encoder is new, because its patches have
another size in half of the arms.
"""

from experiments.settings import NEW_ENCODER, QUICK, base, prerequisites
from vlm_jax.study import Contrast, Study

MERGED = {"projector.kind": "pixel_shuffle"}
PX_64 = {"vision.image_size_px": 64, "vision.patch_size_px": 8}
PX_32 = {"vision.image_size_px": 32, "vision.patch_size_px": 4}
TOKENS_16 = {"projector.factor": 2}
TOKENS_4 = {"projector.factor": 4}


def get_study() -> Study:
    arms = {
        "px64_tokens16": MERGED | PX_64 | TOKENS_16,
        "px64_tokens4": MERGED | PX_64 | TOKENS_4,
        "px32_tokens16": MERGED | PX_32 | TOKENS_16,
        "px32_tokens4": MERGED | PX_32 | TOKENS_4,
    }
    return Study(
        question="Do resolution and the number of image tokens each help to read the same pages?",
        base=base({"vision.checkpoint": "", "train.steps": 600}),
        arms=arms,
        matched={"examples": None},
        reference="px64_tokens16",
        seeds=5,
        metric="nats",
        contrasts={
            "resolution": Contrast(
                "0.5 * (px32_tokens16 + px32_tokens4) - 0.5 * (px64_tokens16 + px64_tokens4)",
                "> 0",
                "MM1, section 3.2; NVLM, table 2: DocVQA 52.9 to 80.2 with tiles",
            ),
            "tokens": Contrast(
                "0.5 * (px64_tokens4 + px32_tokens4) - 0.5 * (px64_tokens16 + px32_tokens16)",
                "> 0",
                "MM1, section 3.2; CASA, table 5b: 59.9 with 32 tokens, 63.8 with 128",
            ),
        },
        tune=dict.fromkeys(arms, NEW_ENCODER),
        prerequisites={"text": prerequisites()["text"]},
        loss_threshold=0.5,
        quick=QUICK,
    )
