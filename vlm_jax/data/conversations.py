"""Conversations about images: LLaVA's published JSON, or a VQA-like set of TFDS, prepared by TFDS and read by index.

A file of LLaVA's format is a list (or JSON Lines, one record per line) of

    {"id": "7", "image": "coco/7.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}, ...]}

`image` is a path below `data.image_dir`, a list of paths, or absent; every <image> in the texts stands for the next of
them. A record may have a `type`, a name by which an evaluation groups the questions.

Two TFDS datasets are made of the files, one of the texts and one of the image files, each image once: every process of
a job reads all texts, because what packs into a row depends on all lengths, and only the images of its rows.
"""

import functools
import hashlib
import itertools
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from vlm_jax.config import Data, DataError, UserError
from vlm_jax.data.conversation_files import DEFAULT_TYPE, read_files
from vlm_jax.data.images import check, read_bytes
from vlm_jax.data.sources import Rows, prepared, split_rows

MOST_NAMED = 10  # images in an error message
STAT_THREADS = 16  # a mounted bucket takes milliseconds for the size of a file
STAT_BATCH = 1000


@dataclass(frozen=True)
class Conversation:
    """Turns of a human and of an assistant, the human first; as many marks in them as there are images."""

    id: str
    images: tuple[int, ...]  # which images of the dataset, in the order of their marks
    turns: tuple[str, ...]
    type: str = DEFAULT_TYPE  # of its question, in evaluation


class Conversations:
    """Random access to the conversations of a split, and to the image files of the dataset.

    Attributes:
      most_images: the number of images of the conversation that has the most.
    """

    def __init__(self, files: tuple[str, ...], texts: Rows, images: Rows | None, most_images: int):
        self._files = files
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
        return Conversation(
            row["id"].decode(), tuple(map(int, row["images"])), turns, row["type"].decode()
        )

    def place(self, index: int) -> str:
        """Returns the words that point to a conversation: its file, and where in it."""
        row = self._texts[index]
        return f"{self._files[row['file']]}: {row['place'].decode()}"

    def image(self, index: int) -> tuple[str, bytes]:
        """The name of an image in error messages, and the content of its file."""
        row = self._images[index]
        return f"image {row['path'].decode()} (record {row['record'].decode()!r})", row["image"]


class Selection:
    """Some of the conversations of a source; images keep their numbers."""

    def __init__(self, source: "Conversations", indices: Sequence[int]):
        self._source = source
        self._indices = indices
        self.most_images = source.most_images
        self.image = source.image

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Conversation:
        return self._source[self._indices[index]]

    def place(self, index: int) -> str:
        """Returns the words that point to a conversation."""
        return self._source.place(self._indices[index])


def load(
    data: Data,
    split: str,
    kind: type["ConversationImages"] | None = None,
    how: tfds.download.DownloadConfig | None = None,
) -> Conversations:
    """The conversations of a split, in the order of the files; prepared if need be.

    Args:
      data: the files and folders.
      split: a TFDS split, such as "train[:90%]".
      kind: the builder of the images, by default `ConversationImages`.
      how: options of that builder.

    Raises:
      DataError: a file is not of the format, images are missing or cannot be decoded, or the split does not exist
        or is empty.
    """
    texts = prepared(_texts_builder(data), data)
    records = texts.info.metadata["image_records"]
    images = None
    if records:
        name = _image_set(texts.builder_config.name, data, records)
        config = tfds.core.BuilderConfig(name=name)
        builder = functools.partial(
            kind or ConversationImages, records, data.image_dir, config=config
        )
        images = Rows(*split_rows(prepared(builder, data, how), data, "images"))
    rows = Rows(*split_rows(texts, data, split))
    return Conversations(data.files, rows, images, texts.info.metadata["most_images"])


def _texts_builder(data: Data) -> Callable[..., tfds.core.DatasetBuilder]:
    files = tuple(str(Path(file).expanduser()) for file in data.files)
    config = tfds.core.BuilderConfig(name=_fingerprint(files, data.image_dir))
    return functools.partial(ConversationTexts, files, config=config)


class _InOrder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset whose content its config's name identifies; its rows keep the order in which they are made."""

    code_path = None  # as for EasyVqa

    def _described(self, **features) -> tfds.core.DatasetInfo:
        features, metadata = tfds.features.FeaturesDict(features), tfds.core.MetadataDict()
        return tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True, metadata=metadata
        )


class ConversationTexts(_InOrder):
    """Split 'train': the conversations in the order of the files, with the numbers of their images.

    The metadata has `most_images`, and in `image_records` the path of every image with the first record that names it.
    """

    VERSION = tfds.core.Version("1.2.0")  # versions before had no file, place and type

    def __init__(self, files: tuple[str, ...], **settings):
        self._files = files
        super().__init__(**settings)

    def _info(self):
        texts, numbers = (
            tfds.features.Sequence(tfds.features.Text()),
            tfds.features.Sequence(np.int64),
        )
        one_text = dict.fromkeys(("place", "id", "type"), tfds.features.Text())
        return self._described(file=np.int64, images=numbers, turns=texts, **one_text)

    def _split_generators(self, dl_manager):
        read = list(read_files(self._files))
        records: dict[str, str] = {}
        for record in read:
            for path in record.image_paths:
                records.setdefault(path, record.id)
        self.info.metadata["image_records"] = records
        self.info.metadata["most_images"] = max(len(record.image_paths) for record in read)
        return {"train": self._generate_examples(read, records)}

    def _generate_examples(self, read, records):
        numbers = {path: i for i, path in enumerate(records)}
        for index, record in enumerate(read):
            fields = {
                name: getattr(record, name) for name in ("file", "place", "id", "turns", "type")
            }
            yield index, fields | {"images": [numbers[path] for path in record.image_paths]}


class ConversationImages(_InOrder):
    """Split 'images': every image file that the conversations name, once, in the order in which they do.

    All files are decoded before the dataset exists, and all that cannot be decoded are named in one DataError.
    """

    VERSION = tfds.core.Version("2.0.0")

    def __init__(self, records: Mapping[str, str], image_dir: str, **settings):
        self._records, self._image_dir = dict(records), Path(image_dir).expanduser()
        super().__init__(**settings)

    def _info(self):
        text, image = tfds.features.Text(), tfds.features.Image()
        return self._described(path=text, record=text, image=image)

    def _split_generators(self, dl_manager):
        return {"images": self._generate_examples()}

    def _generate_examples(self):
        cores = os.cpu_count() or 1
        read = grain.MapDataset.source(list(self._records.items())).map(
            functools.partial(_read, self._image_dir)
        )
        rows = read.to_iter_dataset(
            grain.ReadOptions(num_threads=cores, prefetch_buffer_size=2 * cores)
        )
        problems = []
        for index, row in enumerate(
            tqdm(rows, "reading images", len(read), unit="image", disable=None)
        ):
            if "problem" in row:
                problems.append(row["problem"])
            elif not problems:
                yield index, row
        _refuse(self._image_dir, len(self._records), problems)


class ConversationImagesOnBeam(ConversationImages, skip_registration=True):
    """The same dataset, of which Beam's workers read the image files: see data/prepare.py."""

    name = "conversation_images"

    def _split_generators(self, dl_manager, pipeline):
        return {"images": self._generate_examples(pipeline)}

    def _generate_examples(self, pipeline):
        beam = tfds.core.lazy_imports.apache_beam
        read = functools.partial(_read, self._image_dir)
        refuse = functools.partial(_refuse, self._image_dir, len(self._records))
        listed = pipeline | beam.Create(list(enumerate(self._records.items())))
        rows = listed | beam.MapTuple(lambda index, item: (index, read(item)))
        problems = rows | beam.FlatMapTuple(
            lambda index, row: [row["problem"]] if "problem" in row else []
        )
        _ = problems | beam.combiners.ToList() | beam.Map(refuse)
        return rows | beam.Filter(lambda item: "problem" not in item[1])


def _read(image_dir: Path, item: tuple[str, str]) -> dict:
    """The row of an image, or its `problem` where it cannot be decoded."""
    path, record = item
    try:
        encoded = read_bytes(image_dir / path)
        check(encoded, f"image {path}")
    except UserError as error:
        return {"problem": f"{str(error).rstrip('.')} (record {record!r})"}
    return {"path": path, "record": record, "image": encoded}


def _refuse(image_dir: Path, count: int, problems: Sequence[str]) -> None:
    """Raises DataError where any of the `count` images has a problem."""
    if problems:
        raise DataError(
            f"{len(problems)} of {count} images in data.image_dir {image_dir} cannot be used: {_listed(problems)}; "
            "repair or replace them, and the same command continues."
        )


def _listed(names: Sequence[str]) -> str:
    """The first ten names, and how many there are besides."""
    more = f", and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return "; ".join(names[:MOST_NAMED]) + more


def _image_set(texts_name: str, data: Data, records: Mapping[str, str]) -> str:
    """The name of the set of images: that of the texts, and a digest of the sizes and times of the image files.

    Where image files are missing, as on a machine that only has the prepared sets, it is the set prepared last.

    Raises:
      DataError: image files are missing, and no set was prepared.
    """
    image_dir = Path(data.image_dir).expanduser()
    states = _states(image_dir, list(records))
    missing = [path for path, state in zip(records, states) if state is None]
    if not missing:
        return f"{texts_name}_{hashlib.sha256(repr(states).encode()).hexdigest()[:16]}"
    names = _listed([f"{path} (record {records[path]!r})" for path in missing])
    lack = f"data.image_dir {image_dir} lacks {len(missing)} of {len(records)} images: {names}"
    sets = Path(data.dir).expanduser() / ConversationImages.name
    kept = list(sets.glob(f"{texts_name}_*/{ConversationImages.VERSION}/dataset_info.json"))
    if not kept:
        raise DataError(f"{lack}.")
    _print_once(f"{lack}; the set that was prepared before is used")
    return max(kept, key=os.path.getmtime).parents[1].name


@functools.cache
def _print_once(text: str) -> None:
    """Prints a line; a start loads the same set several times."""
    print(text, flush=True)


def _states(image_dir: Path, paths: Sequence[str]) -> list[tuple[int, int] | None]:
    """`_state` of every image file."""
    parts = [paths[start : start + STAT_BATCH] for start in range(0, len(paths), STAT_BATCH)]
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        states = pool.map(lambda part: [_state(image_dir, path) for path in part], parts)
        return list(itertools.chain.from_iterable(states))


def _state(image_dir: Path, path: str) -> tuple[int, int] | None:
    """Size in bytes and modification time in ns of an image file; None where it does not exist."""
    try:
        status = os.stat(os.path.join(image_dir, path))
    except (OSError, ValueError):  # ValueError: a path with a null character
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _fingerprint(files: tuple[str, ...], image_dir: str) -> str:
    """Returns a name for the contents of the files and the folder of their images."""
    digest = hashlib.sha256(str(Path(image_dir).expanduser().resolve()).encode())
    for file in files:
        digest.update(file_digest(file))
    return digest.hexdigest()[:16]


def file_digest(file: str) -> bytes:
    """Returns the SHA-256 of a file's contents; a file that has not changed is read once by a process."""
    path = Path(file).expanduser()
    try:
        stat = path.stat()
        return _digest(str(path), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"cannot read the conversations of {file}: {error.strerror}.") from None


@functools.cache
def _digest(file: str, size_bytes: int, changed_ns: int) -> bytes:
    """Of what a file says; a start asks six times, and a file of a gigabyte is read once."""
    del size_bytes, changed_ns  # another size or time is another file
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
