"""Records: an image with questions about it, and the base class of datasets of records."""

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlm_jax.config import Data
from vlm_jax.data.builders.base import LocalBuilder
from vlm_jax.data.builders.boxes import Box


@dataclass(frozen=True)
class Record:
    """An image and its questions: question i has answer i, which is of type i."""

    image_id: int
    image: bytes  # content of an image file
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    types: tuple[str, ...]  # names of the groups that an evaluation scores


class RecordBuilder(LocalBuilder, skip_registration=True):
    """Base class of a dataset of records; docs/datasets.md shows how to add one.

    A subclass has a `VERSION`. Raise it when the records change: prepared datasets of the old
    version are then prepared again.

    Attributes:
      splits: names of the splits, such as ("train", "test").
      image_px: height and width of all images; None if they differ.
    """

    splits: tuple[str, ...]
    image_px: int | None = None

    @classmethod
    def settings(cls, data: Data) -> dict[str, Any]:
        """Arguments of the builder. A subclass reads here the `fields` of its row of `DATASETS`."""
        return {}

    @abc.abstractmethod
    def records(self, split: str) -> Iterator[Record]:
        """Yields the records of a split, in a fixed order, each with a unique `image_id`."""

    def boxes(self, record: Record, split: str) -> Sequence[Box | None]:
        """Returns for each question of a record the box of the object it asks about, or None.

        A row of `DATASETS` with `has_boxes` needs it. `split` may be a slice such as "test[:10]".
        """
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        texts = tfds.features.Sequence(tfds.features.Text())
        shape = (self.image_px, self.image_px, 3)
        return self.describe(
            image_id=np.int64,
            image=tfds.features.Image(shape=shape, encoding_format="png"),
            questions=texts,
            answers=texts,
            types=texts,
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        for record in self.records(split):
            yield record.image_id, vars(record)
