"""Attention by fusion style on the digit that a question asks about.

The score is the share of the attention to the image that is on that digit. Uniform attention has
the digit's share of the area, `grounding_area` of eval.json. The report also lists the layers.
"""

from configs.synthetic.digits_unified import get_config
from experiments.settings import CROSS_ATTENTION
from vlm_jax.study import Study, override


def get_study() -> Study:
    fields = {"eval.split": "test", "eval.metrics": ("exact_match", "grounding")}
    return Study(
        question="Which fusion style attends to the digit that a question asks about?",
        base=override(get_config(), fields),
        arms={
            "unified": {},
            "cross_attention": CROSS_ATTENTION,
        },
        matched={"examples": None},
        reference="unified",
        metric="grounding",
        quick={"train.steps": 6, "data.images": (200, 50, 50), "eval.max_examples": 60},
    )
