"""Synthetic datasets, drawn on first use: an example depends on (seed, split, index) alone."""

import abc
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from vlm_jax.config import Data
from vlm_jax.data.builders.boxes import Box
from vlm_jax.data.builders.records import Record, RecordBuilder

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class QA:
    """A question about an image, its answer, and its type, a group of an evaluation."""

    question: str
    answer: str
    type: str
    #: left, top, right and bottom of the object that the question asks for, in pixels; None: it
    #: asks for several or for none
    box_px: tuple[int, int, int, int] | None = None


@dataclass(eq=False)
class SyntheticConfig(tfds.core.BuilderConfig):
    """The fields of `Data` that a synthetic dataset depends on.

    Its name is a folder name, so that datasets of several sizes and seeds exist side by side.
    """

    name: str = ""
    image_px: int = 64
    images: tuple[int, int, int] = (0, 0, 0)  # one number for each of SPLITS
    seed: int = 0
    cell_px: int | None = None
    transcript: bool = False
    fold: int = 0

    @classmethod
    def from_data(cls, data: Data) -> "SyntheticConfig":
        parts = [f"px{data.image_px}"]
        if data.cell_px is not None:
            parts.append(f"cell{data.cell_px}")
        if data.transcript:
            parts.append("transcript")
        if data.fold:
            parts.append(f"fold{data.fold}")
        parts += [f"seed{data.seed}", *map(str, data.images)]
        fields = {field: getattr(data, field) for field in cls.__annotations__ if field != "name"}
        return cls(name="_".join(parts), **fields)


class SyntheticBuilder(RecordBuilder, skip_registration=True):
    """Fills the splits of its `SyntheticConfig` with the examples that a subclass draws."""

    VERSION = tfds.core.Version("1.1.0")
    splits = SPLITS

    @classmethod
    def settings(cls, data: Data) -> dict[str, Any]:
        return {"config": SyntheticConfig.from_data(data)}

    @property
    def image_px(self) -> int:
        return self.builder_config.image_px

    @abc.abstractmethod
    def example(self, rng: np.random.Generator, split: str) -> tuple[Image.Image, list[QA]]:
        """Draws an image of `image_px` and writes the questions about it."""

    def records(self, split: str) -> Iterator[Record]:
        count = self.builder_config.images[SPLITS.index(split)]
        title = f"drawing {self.name} {split}"
        for index in tqdm(range(count), desc=title, unit="image", disable=None):
            image, pairs = self._example(split, index)
            yield Record(
                image_id=index,
                image=_png(image),
                questions=tuple(pair.question for pair in pairs),
                answers=tuple(pair.answer for pair in pairs),
                types=tuple(pair.type for pair in pairs),
            )

    def boxes(self, record: Record, split: str) -> list[Box | None]:
        """Draws the example again: it depends on its split and index alone."""
        _, pairs = self._example(split.partition("[")[0], record.image_id)
        boxes = []
        for pair in pairs:
            box_px = pair.box_px
            boxes.append(box_px and tuple(edge / self.image_px for edge in box_px))
        return boxes

    def _example(self, split: str, index: int) -> tuple[Image.Image, list[QA]]:
        rng = np.random.default_rng([self.builder_config.seed, SPLITS.index(split), index])
        return self.example(rng, split)


def with_transcript(text: str, pairs: Sequence[QA]) -> list[QA]:
    """Returns the questions, each after the text of its image."""
    return [replace(pair, question=f"{text}\n{pair.question}") for pair in pairs]


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def pick(rng: np.random.Generator, choices: Sequence) -> Any:
    """Returns a random element of a sequence; `rng.choice` would convert it to an array."""
    return choices[rng.integers(len(choices))]
