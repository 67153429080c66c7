"""Datasets that are drawn when they are first used: an example is a function of (seed, split, index) alone."""

import abc
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from vlm_jax.config import Data

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class QA:
    question: str
    answer: str
    type: str


@dataclass(eq=False)
class SyntheticConfig(tfds.core.BuilderConfig):
    """What is drawn, by fields of `Data`. Its name is a folder, so that sizes and seeds lie side by side."""

    name: str = ""
    image_px: int = 64
    images: tuple[int, int, int] = (0, 0, 0)  # of each of SPLITS
    seed: int = 0
    cell_px: int = 0
    transcript: bool = False

    @classmethod
    def of(cls, data: Data) -> "SyntheticConfig":
        kind = f"_cell{data.cell_px}" * bool(data.cell_px) + "_transcript" * data.transcript
        name = f"px{data.image_px}{kind}_seed{data.seed}_{'_'.join(map(str, data.images))}"
        fields = {field: getattr(data, field) for field in cls.__annotations__ if field != "name"}
        return cls(name=name, **fields)


def question_info(builder: tfds.core.DatasetBuilder, image_px: int) -> tfds.core.DatasetInfo:
    """A dataset of square images, each with its questions, in the order in which they are made."""
    texts = tfds.features.Sequence(tfds.features.Text())
    features = {
        "image_id": np.int64,
        "image": tfds.features.Image(shape=(image_px, image_px, 3), encoding_format="png"),
        **{"questions": texts, "answers": texts, "types": texts},
    }
    return tfds.core.DatasetInfo(
        builder=builder, features=tfds.features.FeaturesDict(features), disable_shuffling=True
    )


class SyntheticBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Makes the splits that its `SyntheticConfig` asks for, out of what `example` draws."""

    VERSION = tfds.core.Version("1.1.0")
    code_path = None  # as in `sources.EasyVqa`

    @abc.abstractmethod
    def example(self, rng: np.random.Generator, split: str) -> tuple[Image.Image, list[QA]]:
        """An image of `builder_config.image_px` and what is asked about it."""

    def _info(self) -> tfds.core.DatasetInfo:
        return question_info(self, self.builder_config.image_px)

    def _split_generators(self, dl_manager):
        counts = zip(SPLITS, self.builder_config.images, strict=True)
        return {split: self._generate_examples(split, count) for split, count in counts}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        for index in tqdm(
            range(count), desc=f"drawing {self.name} {split}", unit="image", disable=None
        ):
            rng = np.random.default_rng([self.builder_config.seed, SPLITS.index(split), index])
            image, asked = self.example(rng, split)
            yield (
                index,
                {
                    "image_id": index,
                    "image": _png(image),  # bytes and not pixels: those would import TensorFlow
                    "questions": [each.question for each in asked],
                    "answers": [each.answer for each in asked],
                    "types": [each.type for each in asked],
                },
            )


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def pick(rng: np.random.Generator, choices):
    """One of a sequence, as it is: `rng.choice` would make it an array."""
    return choices[rng.integers(len(choices))]
