"""Connectors from the same patches: does a resampler lose detail, and is linear as good as an MLP?

After Honeybee (Cha et al. 2024, arXiv 2312.06742, table 9), NVLM (Dai et al. 2024, section 4.3) and
PaliGemma (Beyer et al. 2024, arXiv 2407.07726). `linear` and `mlp` keep 64 tokens; the others make
16. Encoder and decoder are pretrained, so that no seed stays on the plateau before reading.
"""

from experiments.settings import PARTS_AT_A_THIRD, QUICK, base, prerequisites
from vlm_jax.study import Contrast, Study


def get_study() -> Study:
    arms = {
        "linear": {"projector.kind": "linear"},
        "mlp": {"projector.kind": "mlp"},
        "pixel_shuffle": {"projector.kind": "pixel_shuffle"},
        "average_pool": {"projector.kind": "average_pool"},
        "resampler": {"projector.kind": "resampler", "projector.queries": 16},
    }
    return Study(
        question="Does a resampler lose detail, and is a linear connector as good as an MLP?",
        base=base(),
        arms=arms,
        matched={"examples": None},
        reference="pixel_shuffle",
        seeds=5,
        metric="nats",
        contrasts={
            "resampler": Contrast(
                "resampler - pixel_shuffle",
                "> 0",
                "NVLM, section 4.3; Honeybee, table 9: 64.2 against 70.0",
            ),
            "linear": Contrast(
                "linear - mlp", "= 0", "Honeybee, table 9: 70.0 and 70.2", margin=0.1
            ),
        },
        tune=dict.fromkeys(arms, PARTS_AT_A_THIRD),
        prerequisites=prerequisites(),
        loss_threshold=0.5,
        quick=QUICK,
    )
