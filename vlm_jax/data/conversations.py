"""Conversations about images: LLaVA's published JSON, or a VQA-like set of TFDS, prepared by TFDS and read by index.

A file of LLaVA's format is a list (or, in a .jsonl file, a line each) of

    {"id": "7", "image": "coco/7.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}, ...]}

`image` is a path below `data.image_dir`, a list of paths, or absent; every <image> in the texts stands for the next of
them. Two TFDS datasets are made of the files, one of the texts and one of the image files, each image once: every
process of a job reads all texts, because what packs into a row depends on all lengths, and only the images of its rows.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from vlm_jax.config import ConfigError, Data
from vlm_jax.data.images import read_bytes
from vlm_jax.data.sources import Rows, prepared, split_rows

MARK = "<image>"


@dataclass(frozen=True)
class Conversation:
    """Turns of a human and of an assistant, the human first; as many marks in them as there are images."""

    id: str
    images: tuple[int, ...]  # which images of the dataset, in the order of their marks
    turns: tuple[str, ...]


class Conversations:
    """Random access to the conversations of a split, and to the image files of the dataset.

    Attributes:
      most_images: the number of images of the conversation that has the most.
    """

    def __init__(self, texts: Rows, images: Rows | None, most_images: int):
        self._texts = texts
        self._images = images
        self.most_images = most_images

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Conversation:
        row = self._texts[index]
        turns = tuple(turn.decode() for turn in row["turns"])
        return Conversation(row["id"].decode(), tuple(map(int, row["images"])), turns)

    def image(self, index: int) -> tuple[str, bytes]:
        """The name and the bytes of an image file."""
        row = self._images[index]
        return row["path"].decode(), row["image"]


def load(data: Data, split: str) -> Conversations:
    """The conversations of a split, in the order of the files; prepared if need be.

    Raises:
      ConfigError: a file is not of the format, an image is missing, or the split does not exist or is empty.
    """
    texts = prepared(builder_of(ConversationTexts, data), data)
    most_images = texts.info.metadata["most_images"]
    images = None
    if most_images:
        images = Rows(*split_rows(prepared(builder_of(ConversationImages, data), data), data, "images"))
    return Conversations(Rows(*split_rows(texts, data, split)), images, most_images)


def builder_of(kind: type, data: Data) -> Callable[..., tfds.core.DatasetBuilder]:
    """Makes a builder of `data.files`, given where it is to lie."""
    files = tuple(str(Path(file).expanduser()) for file in data.files)
    config = tfds.core.BuilderConfig(name=_fingerprint(files, data.image_dir))
    return functools.partial(kind, files, data.image_dir, config=config)


class _OfFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset that is made of JSON files; of which, its config's name says."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # as for EasyVqa

    def __init__(self, files: tuple[str, ...], image_dir: str, **given):
        self._files, self._image_dir = files, Path(image_dir).expanduser()
        super().__init__(**given)

    def _described(self, **features) -> tfds.core.DatasetInfo:
        features, metadata = tfds.features.FeaturesDict(features), tfds.core.MetadataDict()
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True, metadata=metadata)


class ConversationTexts(_OfFiles):
    """Split 'train': the conversations in the order of the files, with the numbers of their images."""

    def _info(self):
        texts, numbers = tfds.features.Sequence(tfds.features.Text()), tfds.features.Sequence(np.int64)
        return self._described(id=tfds.features.Text(), images=numbers, turns=texts)

    def _split_generators(self, dl_manager):
        read = list(read_files(self._files))
        self.info.metadata["most_images"] = max((len(paths) for _, paths, _ in read), default=0)
        return {"train": self._generate_examples(read)}

    def _generate_examples(self, read):
        numbers = {path: i for i, path in enumerate(_image_paths(read))}
        for index, (name, paths, turns) in enumerate(read):
            yield index, {"id": name, "images": [numbers[path] for path in paths], "turns": turns}


class ConversationImages(_OfFiles):
    """Split 'images': every image file that the conversations name, once, in the order in which they do."""

    def _info(self):
        return self._described(path=tfds.features.Text(), image=tfds.features.Image())

    def _split_generators(self, dl_manager):
        paths = _image_paths(read_files(self._files))
        missing = [path for path in paths if not (self._image_dir / path).is_file()]
        if missing:
            raise ConfigError(
                f"data.image_dir {self._image_dir} lacks {len(missing)} of {len(paths)} images, such as {missing[0]}."
            )
        return {"images": self._generate_examples(paths)}

    def _generate_examples(self, paths):
        return map(functools.partial(_read, self._image_dir), enumerate(paths))


class ConversationImagesOnBeam(ConversationImages, skip_registration=True):
    """The same dataset, of which Beam's workers read the image files: see data/prepare.py."""

    name = "conversation_images"

    def _generate_examples(self, paths):
        beam = tfds.core.lazy_imports.apache_beam
        return beam.Create(list(enumerate(paths))) | beam.Map(functools.partial(_read, self._image_dir))


def _read(image_dir: Path, numbered: tuple[int, str]) -> tuple[int, dict]:
    index, path = numbered
    return index, {"path": path, "image": read_bytes(image_dir / path)}


def read_files(files: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """The id, the image paths and the turns of every conversation.

    Raises:
      ConfigError: a file or one of its records is not of the format; it names both.
    """
    for file in files:
        for index, record in enumerate(_records(file)):
            name = record.get("id", index) if isinstance(record, dict) else index
            try:
                paths, turns = _images(record), _turns(record)
            except (KeyError, TypeError, AttributeError):
                raise ConfigError(f"{file}: record {name!r} is no conversation in LLaVA's format.") from None
            marks = sum(turn.count(MARK) for turn in turns)
            if marks != len(paths):
                raise ConfigError(f"{file}: record {name!r} has {len(paths)} images and {marks} marks {MARK} for them.")
            if not turns:
                raise ConfigError(f"{file}: record {name!r} has no turn of a human that is answered.")
            yield str(name), paths, turns


def _records(file: str) -> list:
    try:
        with open(file, encoding="utf-8") as opened:
            records = [json.loads(line) for line in opened] if file.endswith(".jsonl") else json.load(opened)
    except OSError as error:
        raise ConfigError(f"data.files: cannot read {file}: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"data.files: {file} is no JSON: {error}.") from None
    if not isinstance(records, list):
        raise ConfigError(f"data.files: {file} is no list of conversations.")
    return records


def _images(record: dict) -> tuple[str, ...]:
    found = record.get("image") or []
    return (found,) if isinstance(found, str) else tuple(Path(path).as_posix() for path in found)


def _turns(record: dict) -> tuple[str, ...]:
    """Human and assistant in turn; an answer before the first question and a question without one are left out."""
    said = [(turn["from"], turn["value"]) for turn in record["conversations"]]
    said = said[1:] if said and said[0][0] == "gpt" else said
    said = said[: len(said) // 2 * 2]
    if any(speaker != ("human", "gpt")[i % 2] or not isinstance(text, str) for i, (speaker, text) in enumerate(said)):
        raise TypeError("human and gpt must take turns")
    return tuple(text for _, text in said)


def _image_paths(read) -> list[str]:
    return list(dict.fromkeys(path for _, paths, _ in read for path in paths))


def _fingerprint(files: tuple[str, ...], image_dir: str) -> str:
    """A name for what the files say and where their images lie."""
    digest = hashlib.sha256(str(Path(image_dir).expanduser().resolve()).encode())
    for file in files:
        try:
            stat = os.stat(file)
            digest.update(_digest(file, stat.st_size, stat.st_mtime_ns))
        except OSError as error:
            raise ConfigError(f"data.files: cannot read {file}: {error.strerror}.") from None
    return digest.hexdigest()[:16]


@functools.cache
def _digest(file: str, size_bytes: int, changed_ns: int) -> bytes:
    """Of what a file says; a start asks six times, and a file of a gigabyte is read once."""
    del size_bytes, changed_ns  # another size or time is another file
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
