"""easy-VQA: colored shapes on 64 x 64 px and questions about them (PyPI: easy-vqa, MIT)."""

import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import easy_vqa
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vlm_jax.data.builders.boxes import Box
from vlm_jax.data.builders.records import Record, RecordBuilder

SHAPES = ("circle", "rectangle", "triangle")
IMAGE_PATHS = {
    "train": easy_vqa.get_train_image_paths,
    "test": easy_vqa.get_test_image_paths,
}
QUESTIONS = {
    "train": easy_vqa.get_train_questions,
    "test": easy_vqa.get_test_questions,
}


class EasyVqa(RecordBuilder):
    """The images of the package `easy_vqa` in the order of their ids, each with its questions."""

    VERSION = tfds.core.Version("1.0.0")
    splits = ("train", "test")
    image_px = 64

    def records(self, split: str) -> Iterator[Record]:
        pairs_by_image = defaultdict(list)
        for question, answer, image_id in zip(*QUESTIONS[split](), strict=True):
            pairs_by_image[image_id].append((question, answer))
        for image_id, path in sorted(IMAGE_PATHS[split]().items()):
            questions, answers = zip(*pairs_by_image[image_id], strict=True)
            types = tuple(answer_type(answer) for answer in answers)
            yield Record(image_id, Path(path).read_bytes(), questions, answers, types)

    def boxes(self, record: Record, split: str) -> list[Box]:
        """Every question is about the only shape; the most frequent color is the background."""
        pixels = np.asarray(Image.open(io.BytesIO(record.image)).convert("RGB"))
        colors, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        is_shape = (pixels != colors[counts.argmax()]).any(-1)
        rows, columns = np.flatnonzero(is_shape.any(1)), np.flatnonzero(is_shape.any(0))
        edges_px = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        return [tuple((edges_px / self.image_px).tolist())] * len(record.questions)


def answer_type(answer: str) -> str:
    """Returns "yes_no", "shape" or "color"."""
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in SHAPES else "color"
