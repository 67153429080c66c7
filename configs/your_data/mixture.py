"""The pictures of configs/your_data/small.py in two forms: asked about, and named as captions.

docs/conversations.md explains the fields of a mixture.
"""

from dataclasses import replace

from configs.your_data import small
from vlm_jax.config import Experiment, Source


def get_config() -> Experiment:
    cfg = small.get_config()
    sources = (
        Source("questions", weight=3.0),
        Source("captions", weight=1.0, template="caption"),
    )
    return replace(cfg, data=replace(cfg.data, mixture=sources))
