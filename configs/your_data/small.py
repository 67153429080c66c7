"""A small model from scratch (method A) for your own pictures with short questions and answers.

--data.files and --data.image_dir name other data: see docs/conversations.md.
"""

from dataclasses import replace

from configs.easy_vqa import unified
from vlm_jax.config import Data, Eval, Experiment, Train


def get_config() -> Experiment:
    return replace(
        unified.get_config(),
        data=Data(
            source="conversations",
            files=("symbols/train.csv",),
            image_dir="symbols",
            images_per_row=3,
            text_length=64,
            augment=(),
        ),
        train=Train(steps=300, batch_size=16, checkpoint_every_steps=100),
        eval=Eval(split="", max_new_tokens=12),
    )
