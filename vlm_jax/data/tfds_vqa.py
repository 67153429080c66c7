"""Any dataset of TFDS with an answer, and perhaps a question and an image, in every row: `data.source tfds:NAME`."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import tensorflow_datasets as tfds

from vlm_jax.config import ConfigError, Data
from vlm_jax.data.conversation_files import IMAGE_PLACEHOLDER
from vlm_jax.data.conversations import Conversation, Selection
from vlm_jax.data.sources import (
    Rows,
    prepared,
    split_field,
    split_rows,
)


class TfdsVqa:
    """Rows as conversations of one question; the image of a row has the row's number.

    Attributes:
      most_images: 1, or 0 where `data.image_field` is empty.
    """

    def __init__(self, rows: Rows, data: Data, class_name: Callable[[int], str] | None):
        """`class_name` turns an answer that is a class into text; None where answers are text."""
        self._rows, self._data, self._class_name = rows, data, class_name
        self.most_images = int(bool(data.image_field))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Conversation:
        row, data = self._rows[index], self._data
        lines = [IMAGE_PLACEHOLDER] if data.image_field else []
        lines += (
            [self._text(index, row, "question_field").replace(IMAGE_PLACEHOLDER, "")]
            if data.question_field
            else []
        )
        if self._class_name is None:
            answer = self._text(index, row, "answer_field")
        else:
            answer = self._class_name(row[data.answer_field])
        return Conversation(str(index), (index,) * self.most_images, ("\n".join(lines), answer))

    def place(self, index: int) -> str:
        """Returns the words that point to a row."""
        return f"row {index} of {self._rows.title}"

    def image(self, index: int) -> tuple[str, bytes]:
        """The name of an image in error messages, and the content of its file."""
        return f"the image of {self.place(index)}", self._rows[index][self._data.image_field]

    def _text(self, index: int, row: Mapping, field: str) -> str:
        """Returns the text in the feature that a field of `Data` names."""
        feature = getattr(self._data, field)
        try:
            return row[feature].decode()
        except UnicodeDecodeError:
            raise ConfigError(
                f"{self.place(index)}: the feature {feature!r} (data.{field}) is not text in UTF-8."
            ) from None


def load(data: Data, split: str) -> TfdsVqa | Selection:
    """The rows of a split, those without a label left out; prepared if need be, which may download them.

    Raises:
      ConfigError: TFDS has no such dataset, it has no such split or features, or no row of the split has a label.
    """
    prepared_builder = builder(data)
    features, texts = prepared_builder.info.features, (tfds.features.Text, tfds.features.ClassLabel)
    for field, kinds in (
        ("image", tfds.features.Image),
        ("question", tfds.features.Text),
        ("answer", texts),
    ):
        chosen = getattr(data, f"{field}_field")
        fitting = [key for key, feature in features.items() if isinstance(feature, kinds)]
        if chosen not in fitting and (chosen or field == "answer"):
            raise ConfigError(
                f"data.{field}_field {chosen!r} is no such feature of {prepared_builder.name}: "
                + (f"choose {', '.join(fitting)}." if fitting else "it has none.")
            )
    rows, answer = Rows(*split_rows(prepared_builder, data, split)), features[data.answer_field]
    if not isinstance(answer, tfds.features.ClassLabel):
        return TfdsVqa(rows, data, None)
    source, labelled = TfdsVqa(rows, data, answer.int2str), _labelled(data, split)
    return source if len(labelled) == len(rows) else Selection(source, labelled)


def builder(data: Data) -> tfds.core.DatasetBuilder:
    """Returns the builder of the dataset that `data.source` names, prepared.

    Raises:
      ConfigError: TFDS has no such dataset.
    """
    return prepared(functools.partial(_builder, data.source.removeprefix("tfds:")), data)


@functools.cache
def _labelled(data: Data, split: str) -> Sequence[int]:
    """Returns the numbers of the rows with a label, and prints how many have none: TFDS marks these with -1.

    A process reads a split for this once.

    Raises:
      ConfigError: no row has a label.
    """
    rows = Rows(*split_rows(builder(data), data, split))
    labelled = [index for index, row in enumerate(rows) if row[data.answer_field] >= 0]
    unlabelled = len(rows) - len(labelled)
    described = f"of the {len(rows)} rows of {rows.title} have no label in {data.answer_field!r}"
    if not labelled:
        raise ConfigError(
            f"{split_field(data, split)} {split!r}: all {described} (data.answer_field): choose a split with labels."
        )
    if unlabelled:
        print(f"{unlabelled} {described} and are left out", flush=True)
    return labelled


def _builder(name: str, **given) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder(name, **given)
    except tfds.core.DatasetNotFoundError as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"data.source tfds:{name} is no dataset of TFDS: {first}") from None
