"""TFDS datasets with an answer, and optionally a question and an image, in every row."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import tensorflow_datasets as tfds

from vlm_jax.config import ConfigError, Data
from vlm_jax.data import sources
from vlm_jax.data.conversations import Conversation, Selection
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.data.sources import Rows, prepared, split_field, split_rows

# Field of `Data` -> the features that it may name.
FEATURE_TYPES = {
    "image_field": tfds.features.Image,
    "question_field": tfds.features.Text,
    "answer_field": (tfds.features.Text, tfds.features.ClassLabel),
}
# Fields that may name a list of texts.
LIST_FIELDS = {"answer_field"}


class TfdsVqa:
    """Random access to rows as conversations of one question; image i belongs to row i.

    Attributes:
      most_images: 1, or 0 if `data.image_field` is empty.
      first_system: "", because no row has a system turn.
    """

    first_system = ""

    def __init__(self, rows: Rows, data: Data, class_name: Callable[[int], str] | None):
        """`class_name` converts an answer that is a class to text; None if answers are text."""
        self._rows = rows
        self._data = data
        self._class_name = class_name
        self.most_images = 1 if data.image_field else 0

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Conversation:
        row, data = self._rows[index], self._data
        lines = []
        if data.image_field:
            lines.append(IMAGE_PLACEHOLDER)
        if data.question_field:
            lines.append(self._text(index, row, "question_field"))
        answers = self._answers(index, row)
        # The most frequent one, and of equally frequent ones the first.
        ((answer, _),) = Counter(answers).most_common(1)
        return Conversation(
            id=str(index),
            images=(index,) * self.most_images,
            turns=("\n".join(lines), answer),
            answers=(answers,),
        )

    def location(self, index: int) -> str:
        """Returns the number of a row and its dataset."""
        return f"row {index} of {self._rows.title}"

    def image(self, index: int) -> tuple[str, bytes]:
        """Returns the name of an image for error messages, and the content of its file."""
        return f"the image of {self.location(index)}", self._rows[index][self._data.image_field]

    def _answers(self, index: int, row: Mapping) -> list[str]:
        """Returns the right answers of a row; a class has one, a text may be several."""
        value = row[self._data.answer_field]
        if self._class_name is not None:
            return [self._class_name(value)]
        texts = [value] if isinstance(value, bytes) else value
        answers = [self._decode(index, text, "answer_field") for text in texts]
        if not answers:
            raise ConfigError(
                f"{self.location(index)} has no text in {self._data.answer_field!r} "
                "(data.answer_field): choose a split with answers."
            )
        return answers

    def _text(self, index: int, row: Mapping, field: str) -> str:
        """Returns the text of the feature that a field of `Data` names, without placeholders."""
        return self._decode(index, row[getattr(self._data, field)], field)

    def _decode(self, index: int, text: bytes, field: str) -> str:
        feature = getattr(self._data, field)
        try:
            # The image of a row precedes its question, so that no text has a place for it.
            return text.decode().replace(IMAGE_PLACEHOLDER, "")
        except UnicodeDecodeError:
            raise ConfigError(
                f"{self.location(index)}: the feature {feature!r} (data.{field}) is not text in "
                "UTF-8."
            ) from None


def load(data: Data, split: str) -> TfdsVqa | Selection:
    """Returns the rows of a split that have a label; prepares the dataset if necessary.

    Preparing may download it.

    Raises:
      ConfigError: TFDS has no such dataset, the dataset has no such split or feature, or no row of
        the split has a label.
    """
    dataset = builder(data)
    features = dataset.info.features
    for field in FEATURE_TYPES:
        _check_feature(dataset, field, getattr(data, field))
    rows = Rows(*split_rows(dataset, data, split))
    answer = features[data.answer_field]
    if not isinstance(answer, tfds.features.ClassLabel):
        return TfdsVqa(rows, data, None)
    source = TfdsVqa(rows, data, answer.int2str)
    labeled = _labeled(data, split)
    return source if len(labeled) == len(rows) else Selection(source, labeled)


def _check_feature(dataset: tfds.core.DatasetBuilder, field: str, name: str) -> None:
    """Raises ConfigError if a field of `Data` names no feature of the right type."""
    choices = [key for key, feature in dataset.info.features.items() if _has_type(feature, field)]
    is_optional = field != "answer_field"
    if name in choices or (is_optional and not name):
        return
    way_out = f"choose {', '.join(choices)}" if choices else "it has no such feature"
    raise ConfigError(f"data.{field} {name!r} is not a feature of {dataset.name}: {way_out}.")


def _has_type(feature: tfds.features.FeatureConnector, field: str) -> bool:
    """Returns whether a field of `Data` may name the feature."""
    if field in LIST_FIELDS and isinstance(feature, tfds.features.Sequence):
        return isinstance(feature.feature, tfds.features.Text)
    return isinstance(feature, FEATURE_TYPES[field])


def builder(data: Data) -> tfds.core.DatasetBuilder:
    """Returns the prepared builder of the dataset that `data.source` names.

    Raises:
      ConfigError: TFDS has no such dataset.
    """
    _, _, name = data.source.partition(":")
    return prepared(functools.partial(_make_builder, name), data)


def fingerprint(data: Data) -> dict[str, str]:
    """Returns the name, version, configuration and sizes of the dataset."""
    return sources.fingerprint(builder(data).info, data)


@functools.cache
def _labeled(data: Data, split: str) -> Sequence[int]:
    """Returns the indices of the rows with a label, and prints how many have none (-1 in TFDS).

    A process reads a split for this once.

    Raises:
      ConfigError: no row has a label.
    """
    rows = Rows(*split_rows(builder(data), data, split))
    labeled = [index for index, row in enumerate(rows) if row[data.answer_field] >= 0]
    unlabeled = len(rows) - len(labeled)
    description = f"of the {len(rows)} rows of {rows.title} have no label in {data.answer_field!r}"
    if not labeled:
        raise ConfigError(
            f"{split_field(data, split)} {split!r}: all {description} (data.answer_field): choose "
            "a split with labels."
        )
    if unlabeled:
        print(f"{unlabeled} {description} and are left out", flush=True)
    return labeled


def _make_builder(name: str, **settings) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder(name, **settings)
    except tfds.core.DatasetNotFoundError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"data.source tfds:{name} is not a dataset of TFDS: {reason}") from None
