"""Conversations about images, prepared by TFDS from files in any form and read by index.

The forms are the rows of `CONVERSATION_FORMATS` (data/forms/). Every <image> in the texts is the
placeholder of the next image of the conversation.

For evaluation, a record may have a `type`, by which questions are grouped, `answers`, several
references for its question, and `choices`, the texts of a multiple-choice question. With several
questions, `answers` and `choices` have a list for each; an empty one stands for the answer in the
conversation.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorflow_datasets as tfds

from vlm_jax.config import Data, DataError
from vlm_jax.config.datasets import AUTO
from vlm_jax.data.builders import conversations as builders
from vlm_jax.data.forms import arrow
from vlm_jax.data.forms.record import DEFAULT_TYPE
from vlm_jax.data.sources import Rows, prepared, split_rows


@dataclass(frozen=True)
class Conversation:
    """Turns of a human and an assistant, the human first, with one placeholder per image."""

    id: str
    images: tuple[int, ...]  # indices of images of the dataset, in the order of their placeholders
    turns: tuple[str, ...]
    type: str = DEFAULT_TYPE  # of its questions, in evaluation
    # As in ConversationRecord.
    system: str | None = None
    answers: Sequence[Sequence[str]] = ()
    choices: Sequence[Sequence[str]] = ()


class Conversations:
    """Random access to the conversations of a split, and to the image files of the dataset.

    Attributes:
      most_images: largest number of images in a conversation of the dataset.
      first_system: location of the first record with a system turn; "" if none has.
    """

    def __init__(
        self,
        files: tuple[str, ...],
        texts: Rows,
        images: Rows | None,
        most_images: int,
        first_system: str,
    ):
        self._files = files
        self._texts = texts
        self._images = images
        self.most_images = most_images
        self.first_system = first_system

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Conversation:
        record = self._record(index)
        return Conversation(
            id=record["id"],
            images=tuple(record["images"]),
            turns=tuple(record["turns"]),
            type=record["type"],
            system=record["system"],
            answers=record["answers"],
            choices=record["choices"],
        )

    def _record(self, index: int) -> dict:
        return json.loads(self._texts[index]["record"])

    def location(self, index: int) -> str:
        """Returns the file of a conversation and its position in the file."""
        record = self._record(index)
        return f"{self._files[record['file']]}: {record['location']}"

    def image(self, index: int) -> tuple[str, bytes]:
        """Returns the name of an image for error messages, and the content of its file."""
        row = self._images[index]
        return f"image {row['path'].decode()} (record {row['record'].decode()!r})", row["image"]


class Selection:
    """A subset of the conversations of a source; image indices stay."""

    def __init__(self, source: "Conversations", indices: Sequence[int]):
        self._source = source
        self._indices = indices
        self.most_images = source.most_images
        self.first_system = source.first_system
        self.image = source.image

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Conversation:
        return self._source[self._indices[index]]

    def location(self, index: int) -> str:
        """Returns the location of a conversation in its source."""
        return self._source.location(self._indices[index])


def load(
    data: Data,
    split: str,
    image_builder: type[builders.ConversationImages] | None = None,
    download_config: tfds.download.DownloadConfig | None = None,
) -> Conversations | Selection:
    """Returns the conversations of a split, in the order of the files; prepares them if necessary.

    Two TFDS datasets are made of the files, one of the texts and one of the images. Every
    process of a job reads all texts, because which conversations share a row depends on all
    lengths, but the images of its rows only.

    Args:
      data: the files and folders.
      split: a TFDS split, such as "train[:90%]".
      image_builder: builder of the images, by default `ConversationImages`.
      download_config: options of that builder.

    Raises:
      DataError: a file is malformed, images are missing or cannot be decoded, or every conversation
        of the split has such an image (data.unreadable_images skip).
      ConfigError: the split does not exist or is empty.
    """
    name = _texts_name(data)
    texts = prepared(builders.texts_builder(name, data), data)
    records = texts.info.metadata["image_records"]
    images = None
    unreadable: dict[str, str] = {}
    if records:
        make_builder = builders.images_builder(name, data, records, image_builder)
        builder = prepared(make_builder, data, download_config)
        unreadable = builder.info.metadata["unreadable"]
        images = Rows(*split_rows(builder, data, "images"))
    rows = Rows(*split_rows(texts, data, split))
    metadata = texts.info.metadata
    source = Conversations(
        data.files, rows, images, metadata["most_images"], metadata["first_system"]
    )
    return _without_unreadable(source, unreadable) if unreadable else source


def _without_unreadable(source: Conversations, unreadable: dict[str, str]) -> Selection:
    """Returns the conversations whose images can be read, and prints how many others there are.

    Args:
      source: all conversations of a split.
      unreadable: index of each unreadable image -> its problem.

    Raises:
      DataError: no conversation is left.
    """
    readable, problems = [], {}
    for index, conversation in enumerate(source):
        bad = [str(image) for image in conversation.images if str(image) in unreadable]
        if not bad:
            readable.append(index)
        for image in bad:
            problems[image] = unreadable[image]
    left_out = len(source) - len(readable)
    message = (
        f"{left_out} of {len(source)} conversations have images that cannot be used "
        f"({builders.list_first(list(problems.values()))})"
    )
    if not readable:
        raise DataError(f"{message}: none is left.")
    if left_out:
        builders.print_once(f"{message} and are left out (data.unreadable_images skip)")
    return Selection(source, readable)


def fingerprint(data: Data) -> dict[str, str]:
    """Returns the SHA-256 of each file."""
    return {file: _file_digest(file).hex() for file in data.files}


def _texts_name(data: Data) -> str:
    """Returns a name for the contents of the files together with the folder of their images."""
    digest = hashlib.sha256(str(Path(os.path.expanduser(data.image_dir)).resolve()).encode())
    if data.format != AUTO:
        digest.update(data.format.encode())
    for file in data.files:
        digest.update(_file_digest(file))
    return digest.hexdigest()[:16]


def _file_digest(file: str) -> bytes:
    """Returns the SHA-256 of a file, or of the digests of a saved dataset's files.

    A process reads a file that does not change once.
    """
    path = Path(os.path.expanduser(file))
    try:
        if path.is_dir():
            digests = [_file_digest(str(part)) for part in arrow.files(path)]
            return hashlib.sha256(b"".join(digests)).digest()
        status = path.stat()
        return _digest(str(path), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DataError(f"cannot read the conversations of {file}: {error.strerror}.") from None


@functools.cache
def _digest(path: str, size_bytes: int, changed_ns: int) -> bytes:
    """Returns the SHA-256 of a file, cached because it is needed six times at start-up."""
    del size_bytes, changed_ns  # parts of the cache's key
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
