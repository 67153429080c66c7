"""Draws a sheet of a synthetic dataset, and prints its baselines without the image.

python experiments/datasets.py --source glyphs --image-px 128 --sheet docs/glyphs_samples.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from vlm_jax.config import Data, Experiment, Vision
from vlm_jax.config.datasets import sources_that_read
from vlm_jax.data import questions, sources
from vlm_jax.data.synthetic.blind_baselines import question_only_baselines
from vlm_jax.infer.samples import draw_samples

SYNTHETIC = tuple(sources_that_read("image_px"))


@dataclass(frozen=True)
class Show:
    source: Literal[SYNTHETIC]
    sheet: Path  # the picture to write
    image_px: int = 64  # height and width of an image
    #: glyphs: width of the cells of typewritten letters; None: placed freely
    cell_px: int | None = None
    images: int = 2000  # of the training split, whose questions are counted
    dir: str = Data.dir  # the folder that datasets are prepared in


def main(show: Show) -> None:
    data = Data(
        source=show.source,
        dir=show.dir,
        image_px=show.image_px,
        cell_px=show.cell_px,
        images=(show.images, 100, 100),
        augment=(),
    )
    cfg = Experiment(data=data, vision=Vision(image_size_px=show.image_px))
    samples = questions.load(cfg, "train", 200)
    draw_samples(show.sheet, samples, [question.answer for question in samples], "train")
    print("| type | questions | best single answer | best word of the question |")
    print("|---|---|---|---|")
    baselines = question_only_baselines(sources.load(data, "train"))
    for kind, (count, constant, repeated) in baselines.items():
        print(f"| `{kind}` | {count} | {constant:.3f} | {repeated:.3f} |")


if __name__ == "__main__":
    main(tyro.cli(Show))
