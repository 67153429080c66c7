"""TFDS builders of conversations: a dataset of the texts, and a dataset of the images.

An image has a key: the path of its file, or the digest of its content if it is stored in a file of
conversations. Such a file is read once for the texts and once more for the images.
"""

import functools
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from tqdm import tqdm

from vlm_jax.config import ConfigError, Data, DataError, UserError
from vlm_jax.data.builders.base import LocalBuilder
from vlm_jax.data.forms.files import read_files
from vlm_jax.data.forms.record import ConversationRecord
from vlm_jax.data.images import check, read_bytes

MAX_LISTED = 10  # images in an error message
# A mounted bucket takes milliseconds for the size of a file.
STAT_THREADS = 16
STAT_BATCH = 1000  # files
STORED = "sha256:"  # begins the key of an image that is stored in a file of conversations
NO_CONTENT = b""  # of an image that cannot be read
CHECKED_TOGETHER = 256  # images in memory at a time

BuilderFactory = Callable[..., tfds.core.DatasetBuilder]


class ConversationTexts(LocalBuilder, skip_registration=True):
    """Split 'train': the conversations in the order of the files, with the indices of their images.

    A row is the JSON text of a `ConversationRecord`, which TFDS and json parse in less time than a
    row with a feature for each field.

    The metadata has `most_images`, the location of the first record with a system turn in
    `first_system` ("" if none has), and in `image_records` the key of every image with the id of
    the first record that has it.
    """

    # Before version 2.0.0 a row had a feature for each field.
    VERSION = tfds.core.Version("2.0.0")

    def __init__(self, files: tuple[str, ...], format_name: str, **settings):
        self._files = files
        self._format = format_name
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.describe(metadata=tfds.core.MetadataDict(), record=tfds.features.Text())

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        records = []
        first_records: dict[str, str] = {}
        first_system = ""
        for record in read_files(self._files, self._format):
            # Contents of images are not kept in memory.
            keys = tuple(map(image_key, record.images))
            records.append(replace(record, images=keys))
            for key in keys:
                first_records.setdefault(key, record.id)
            if record.system is not None and not first_system:
                first_system = f"{self._files[record.file]}: {record.location}"
        self.info.metadata["image_records"] = first_records
        self.info.metadata["most_images"] = max(len(record.images) for record in records)
        self.info.metadata["first_system"] = first_system
        return {"train": self._generate_examples(records, list(first_records))}

    def _generate_examples(
        self, records: Sequence[ConversationRecord], image_keys: Sequence[str]
    ) -> Iterator[tuple[int, dict]]:
        image_index = {key: index for index, key in enumerate(image_keys)}
        for index, record in enumerate(records):
            images = [image_index[key] for key in record.images]
            yield index, {"record": json.dumps(vars(record) | {"images": images})}


class StoredImages(NamedTuple):
    """Images in files of conversations: the arguments of `read_files`."""

    files: tuple[str, ...]
    format_name: str


class ImageItem(NamedTuple):
    """An image to read: its name in messages, and the first record that has it."""

    name: str  # of an image file: its path
    record: str  # its id
    content: bytes | None  # None: of the file


class ConversationImages(LocalBuilder, skip_registration=True):
    """Split 'images': every image of the conversations, in the order of first use.

    All images are decoded before the dataset exists. One DataError names all that fail; if they are
    skipped, their rows have no content, and the metadata has the `unreadable` indices with their
    problems.
    """

    VERSION = tfds.core.Version("2.0.0")

    def __init__(
        self,
        records: Mapping[str, str],
        image_dir: str,
        stored: StoredImages,
        skips_unreadable: bool,
        **settings,
    ):
        """`records` has the key of each image with the id of the first record that has it."""
        self._records = dict(records)
        self._image_dir = Path(os.path.expanduser(image_dir))
        self._stored = stored
        self._skips_unreadable = skips_unreadable
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return self.describe(
            metadata=tfds.core.MetadataDict(unreadable={}),
            path=text,
            record=text,
            image=tfds.features.Image(),
        )

    def _split_generators(self, dl_manager):
        return {"images": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        problems = {}
        bar = tqdm(
            self._read_all(),
            desc="reading images",
            total=len(self._records),
            unit="image",
            disable=None,
        )
        for index, row in enumerate(bar):
            if "problem" in row:
                problems[str(index)] = row.pop("problem")
            if self._skips_unreadable or not problems:
                yield index, row
        if not self._skips_unreadable:
            _raise_problems(self._place(), len(self._records), list(problems.values()))
        self.info.metadata["unreadable"] = problems

    def _read_all(self) -> Iterator[dict]:
        """Yields the rows of all images, read and decoded on all cores."""
        reader = functools.partial(_read_image, self._image_dir)
        items = self._items()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            while chunk := list(itertools.islice(items, CHECKED_TOGETHER)):
                yield from pool.map(reader, chunk)

    def _place(self) -> str:
        """Returns where the images are, for messages."""
        if any(map(is_stored, self._records)):
            return ", ".join(self._stored.files)
        return f"data.image_dir {self._image_dir}"

    def _items(self) -> Iterator[ImageItem]:
        if not any(map(is_stored, self._records)):
            for path, record in self._records.items():
                yield ImageItem(path, record, None)
            return
        seen = set()
        for record in read_files(*self._stored):
            for number, image in enumerate(record.images, 1):
                key = image_key(image)
                if key not in seen:
                    seen.add(key)
                    is_file = isinstance(image, str)
                    name = image if is_file else f"{number} of {record.location}"
                    yield ImageItem(name, record.id, None if is_file else image)


class ConversationImagesOnBeam(ConversationImages, skip_registration=True):
    """The same dataset; Apache Beam's workers read the image files. See data/prepare.py."""

    name = "conversation_images"

    def _split_generators(self, dl_manager, pipeline):
        return {"images": self._generate_examples(pipeline)}

    def _generate_examples(self, pipeline):
        if any(map(is_stored, self._records)):
            raise ConfigError(
                f"{', '.join(self._stored.files)} hold images themselves: Beam reads only image "
                "files, so let training prepare the dataset."
            )
        beam = tfds.core.lazy_imports.apache_beam
        reader = functools.partial(_read_image, self._image_dir)
        raise_problems = functools.partial(_raise_problems, self._place(), len(self._records))
        items = pipeline | beam.Create(list(enumerate(self._items())))
        rows = items | beam.MapTuple(lambda index, item: (index, reader(item)))
        problems = rows | beam.FlatMapTuple(
            lambda index, row: [row["problem"]] if "problem" in row else []
        )
        _ = problems | beam.combiners.ToList() | beam.Map(raise_problems)
        return rows | beam.Filter(lambda item: "problem" not in item[1])


def image_key(image: str | bytes) -> str:
    """Returns the path of an image, or the digest of its content."""
    return image if isinstance(image, str) else STORED + hashlib.sha256(image).hexdigest()


def is_stored(key: str) -> bool:
    """Returns whether an image is stored in a file of conversations."""
    return key.startswith(STORED)


def texts_builder(name: str, data: Data) -> BuilderFactory:
    """Returns what makes the builder of the texts; the dataset's configuration is `name`."""
    config = tfds.core.BuilderConfig(name=name)
    return functools.partial(ConversationTexts, _paths(data), data.format, config=config)


def images_builder(
    texts_name: str,
    data: Data,
    records: Mapping[str, str],
    builder_class: type[ConversationImages] | None = None,
) -> BuilderFactory:
    """Returns what makes the builder of the images; `records` as in `ConversationImages`.

    Raises:
      DataError: image files are missing, and no dataset of them was prepared before.
    """
    config = tfds.core.BuilderConfig(name=_images_name(texts_name, data, records))
    return functools.partial(
        builder_class or ConversationImages,
        records,
        data.image_dir,
        StoredImages(_paths(data), data.format),
        data.unreadable_images == "skip",
        config=config,
    )


def _paths(data: Data) -> tuple[str, ...]:
    return tuple(str(Path(os.path.expanduser(file))) for file in data.files)


def _read_image(image_dir: Path, item: ImageItem) -> dict:
    """Returns the row of an image; if it cannot be decoded, without content but with `problem`."""
    row = {"path": item.name, "record": item.record}
    try:
        encoded = read_bytes(image_dir / item.name) if item.content is None else item.content
        check(encoded, f"image {item.name}")
    except UserError as error:
        problem = f"{str(error).rstrip('.')} (record {item.record!r})"
        return row | {"image": NO_CONTENT, "problem": problem}
    return row | {"image": encoded}


def _raise_problems(place: str, count: int, problems: Sequence[str]) -> None:
    """Raises DataError if any of the `count` images has a problem."""
    if problems:
        raise DataError(
            f"{len(problems)} of {count} images in {place} cannot be used: "
            f"{list_first(problems)}; repair or replace them and run the same command again."
        )


def list_first(names: Sequence[str]) -> str:
    """Returns the first `MAX_LISTED` names and the number of the others."""
    more = f", and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return "; ".join(names[:MAX_LISTED]) + more


def _images_name(texts_name: str, data: Data, records: Mapping[str, str]) -> str:
    """Returns the texts' name with a digest of the sizes and modification times of the image files.

    If image files are missing, as on a machine that only has the prepared datasets, it is the name
    of the dataset prepared last. A dataset that skips them is prepared if there are any.

    Raises:
      DataError: image files are missing, and no dataset of them was prepared before.
    """
    image_dir = Path(os.path.expanduser(data.image_dir))
    paths = [key for key in records if not is_stored(key)]
    states = _file_states(image_dir, paths)
    missing = [path for path, state in zip(paths, states) if state is None]
    is_skipping = data.unreadable_images == "skip"
    suffix = "_skip" if is_skipping else ""
    if not missing or (is_skipping and len(missing) < len(records)):
        return f"{texts_name}_{hashlib.sha256(repr(states).encode()).hexdigest()[:16]}{suffix}"
    names = list_first([f"{path} (record {records[path]!r})" for path in missing])
    problem = f"data.image_dir {image_dir} lacks {len(missing)} of {len(records)} images: {names}"
    datasets = Path(os.path.expanduser(data.dir)) / ConversationImages.name
    digest = "?" * 16
    pattern = f"{texts_name}_{digest}{suffix}/{ConversationImages.VERSION}/dataset_info.json"
    prepared = list(datasets.glob(pattern))
    if not prepared:
        raise DataError(f"{problem}.")
    print_once(f"{problem}; using the dataset that was prepared last")
    return max(prepared, key=os.path.getmtime).parents[1].name


@functools.cache
def print_once(text: str) -> None:
    """Prints a line; a start loads the same dataset several times."""
    print(text, flush=True)


def _file_states(image_dir: Path, paths: Sequence[str]) -> list[tuple[int, int] | None]:
    """Returns `_file_state` of every image file."""
    batches = [paths[start : start + STAT_BATCH] for start in range(0, len(paths), STAT_BATCH)]

    def states(batch: Sequence[str]) -> list[tuple[int, int] | None]:
        return [_file_state(image_dir, path) for path in batch]

    with ThreadPoolExecutor(STAT_THREADS) as pool:
        return list(itertools.chain.from_iterable(pool.map(states, batches)))


def _file_state(image_dir: Path, path: str) -> tuple[int, int] | None:
    """Returns size in bytes and modification time in ns of a file; None if it does not exist."""
    try:
        status = os.stat(os.path.join(image_dir, path))
    except (OSError, ValueError):  # ValueError: a path with a NUL character
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
