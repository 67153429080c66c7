"""Any dataset of TFDS with an answer, and perhaps a question and an image, in every row: `data.source tfds:NAME`."""

import functools
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds

from vlm_jax.config import ConfigError, Data
from vlm_jax.data.conversations import MARK, Conversation
from vlm_jax.data.sources import Rows, prepared, split_rows


class AskedRows:
    """Rows as conversations of one question; the image of a row has the row's number.

    Attributes:
      most_images: 1, or 0 where `data.image_field` is empty.
    """

    def __init__(self, rows: Rows, data: Data, read_answer: Callable[[object], str]):
        self._rows, self._data, self._read_answer = rows, data, read_answer
        self.most_images = int(bool(data.image_field))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Conversation:
        row, data = self._rows[index], self._data
        lines = [MARK] if data.image_field else []
        lines += [row[data.question_field].decode().replace(MARK, "")] if data.question_field else []
        turns = "\n".join(lines), self._read_answer(row[data.answer_field])
        return Conversation(str(index), (index,) * self.most_images, turns)

    def image(self, index: int) -> tuple[str, bytes]:
        """The name of an image in error messages, and the content of its file."""
        name = f"the image of row {index} of {self._rows.title}"
        return name, self._rows[index][self._data.image_field]


def load(data: Data, split: str) -> AskedRows:
    """The rows of a split; prepared if need be, which may download them.

    Raises:
      ConfigError: TFDS has no such dataset, or it has no such split or features.
    """
    name = data.source.removeprefix("tfds:")
    builder = prepared(functools.partial(_builder, name), data)
    features, texts = builder.info.features, (tfds.features.Text, tfds.features.ClassLabel)
    for field, kinds in (("image", tfds.features.Image), ("question", tfds.features.Text), ("answer", texts)):
        chosen = getattr(data, f"{field}_field")
        fitting = [key for key, feature in features.items() if isinstance(feature, kinds)]
        if chosen not in fitting and (chosen or field == "answer"):
            raise ConfigError(
                f"data.{field}_field {chosen!r} is no such feature of {name}: "
                + (f"choose {', '.join(fitting)}." if fitting else "it has none.")
            )
    answer = features[data.answer_field]
    read_answer = answer.int2str if isinstance(answer, tfds.features.ClassLabel) else bytes.decode
    return AskedRows(Rows(*split_rows(builder, data, split)), data, read_answer)


def _builder(name: str, **given) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder(name, **given)
    except tfds.core.DatasetNotFoundError as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"data.source tfds:{name} is no dataset of TFDS: {first}") from None
