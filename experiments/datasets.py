"""What a drawn dataset looks like, and what can be answered without looking.

python experiments/datasets.py --source glyphs --image-px 128 --sheet docs/glyphs_samples.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from vlm_jax.config import Data, Experiment, Vision
from vlm_jax.data import questions, sources
from vlm_jax.data.blind_baselines import question_only_baselines
from vlm_jax.infer.samples import draw_samples


@dataclass(frozen=True)
class Show:
    source: Literal["glyphs", "digits"]
    sheet: Path  # the picture that is written
    image_px: int = 64  # height and width of an image
    cell_px: int = 0  # glyphs: width of the cells of typewritten letters; 0: letters are set freely
    images: int = 2000  # of the training split, whose questions are counted


def main(show: Show) -> None:
    data = Data(
        source=show.source,
        image_px=show.image_px,
        cell_px=show.cell_px,
        images=(show.images, 100, 100),
        augment=(),
    )
    asked = questions.load(
        Experiment(data=data, vision=Vision(image_size_px=show.image_px)), "train", 200
    )
    draw_samples(show.sheet, asked, [question.answer for question in asked])
    print(
        "| type | questions | best single answer | best word of the question |\n|---|---|---|---|"
    )
    for kind, (count, constant, repeated) in question_only_baselines(
        sources.load(data, "train")
    ).items():
        print(f"| `{kind}` | {count} | {constant:.3f} | {repeated:.3f} |")


if __name__ == "__main__":
    main(tyro.cli(Show))
