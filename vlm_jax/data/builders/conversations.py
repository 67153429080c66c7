"""TFDS builders of conversations: a dataset of the texts, and a dataset of the image files."""

import functools
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from vlm_jax.config import Data, DataError, UserError
from vlm_jax.data.builders.base import LocalBuilder
from vlm_jax.data.conversation_files import ConversationRecord, read_files
from vlm_jax.data.images import check, read_bytes

MAX_LISTED = 10  # images in an error message
# A mounted bucket takes milliseconds for the size of a file.
STAT_THREADS = 16
STAT_BATCH = 1000  # files

BuilderFactory = Callable[..., tfds.core.DatasetBuilder]


class ConversationTexts(LocalBuilder, skip_registration=True):
    """Split 'train': the conversations in the order of the files, with the indices of their images.

    The metadata has `most_images`, and in `image_records` the path of every image with the id of
    the first record that names it.
    """

    # Before version 1.2.0 rows had no file, place and type, before 1.3.0 no answers and choices.
    VERSION = tfds.core.Version("1.3.0")

    def __init__(self, files: tuple[str, ...], **settings):
        self._files = files
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return self.describe(
            metadata=tfds.core.MetadataDict(),
            file=np.int64,
            place=text,
            id=text,
            type=text,
            images=tfds.features.Sequence(np.int64),
            turns=tfds.features.Sequence(text),
            # JSON, since lists of lists have no feature that is read without TensorFlow.
            answers=text,
            choices=text,
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        records = list(read_files(self._files))
        first_records: dict[str, str] = {}
        for record in records:
            for path in record.image_paths:
                first_records.setdefault(path, record.id)
        self.info.metadata["image_records"] = first_records
        self.info.metadata["most_images"] = max(len(record.image_paths) for record in records)
        return {"train": self._generate_examples(records, list(first_records))}

    def _generate_examples(
        self, records: Sequence[ConversationRecord], image_paths: Sequence[str]
    ) -> Iterator[tuple[int, dict]]:
        image_index = {path: index for index, path in enumerate(image_paths)}
        for index, record in enumerate(records):
            yield (
                index,
                {
                    "file": record.file,
                    "place": record.location,
                    "id": record.id,
                    "type": record.type,
                    "images": [image_index[path] for path in record.image_paths],
                    "turns": record.turns,
                    "answers": json.dumps(record.answers),
                    "choices": json.dumps(record.choices),
                },
            )


class ConversationImages(LocalBuilder, skip_registration=True):
    """Split 'images': every image file that the conversations name, in the order of first use.

    All files are decoded before the dataset exists. One DataError names all that fail.
    """

    VERSION = tfds.core.Version("2.0.0")

    def __init__(self, records: Mapping[str, str], image_dir: str, **settings):
        """`records` has the path of each image with the id of the first record that names it."""
        self._records = dict(records)
        self._image_dir = Path(image_dir).expanduser()
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return self.describe(path=text, record=text, image=tfds.features.Image())

    def _split_generators(self, dl_manager):
        return {"images": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        cores = os.cpu_count() or 1
        reader = functools.partial(_read_image, self._image_dir)
        dataset = grain.MapDataset.source(list(self._records.items())).map(reader)
        options = grain.ReadOptions(num_threads=cores, prefetch_buffer_size=2 * cores)
        bar = tqdm(
            dataset.to_iter_dataset(options),
            desc="reading images",
            total=len(dataset),
            unit="image",
            disable=None,
        )
        problems = []
        for index, row in enumerate(bar):
            if "problem" in row:
                problems.append(row["problem"])
            elif not problems:
                yield index, row
        _raise_problems(self._image_dir, len(self._records), problems)


class ConversationImagesOnBeam(ConversationImages, skip_registration=True):
    """The same dataset; Apache Beam's workers read the image files. See data/prepare.py."""

    name = "conversation_images"

    def _split_generators(self, dl_manager, pipeline):
        return {"images": self._generate_examples(pipeline)}

    def _generate_examples(self, pipeline):
        beam = tfds.core.lazy_imports.apache_beam
        reader = functools.partial(_read_image, self._image_dir)
        raise_problems = functools.partial(_raise_problems, self._image_dir, len(self._records))
        items = pipeline | beam.Create(list(enumerate(self._records.items())))
        rows = items | beam.MapTuple(lambda index, item: (index, reader(item)))
        problems = rows | beam.FlatMapTuple(
            lambda index, row: [row["problem"]] if "problem" in row else []
        )
        _ = problems | beam.combiners.ToList() | beam.Map(raise_problems)
        return rows | beam.Filter(lambda item: "problem" not in item[1])


def texts_builder(name: str, data: Data) -> BuilderFactory:
    """Returns what makes the builder of the texts; the dataset's configuration is `name`."""
    files = tuple(str(Path(file).expanduser()) for file in data.files)
    config = tfds.core.BuilderConfig(name=name)
    return functools.partial(ConversationTexts, files, config=config)


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
        builder_class or ConversationImages, records, data.image_dir, config=config
    )


def _read_image(image_dir: Path, item: tuple[str, str]) -> dict:
    """Returns the row of an image, or its `problem` if the file cannot be decoded."""
    path, record = item
    try:
        encoded = read_bytes(image_dir / path)
        check(encoded, f"image {path}")
    except UserError as error:
        return {"problem": f"{str(error).rstrip('.')} (record {record!r})"}
    return {"path": path, "record": record, "image": encoded}


def _raise_problems(image_dir: Path, count: int, problems: Sequence[str]) -> None:
    """Raises DataError if any of the `count` images has a problem."""
    if problems:
        raise DataError(
            f"{len(problems)} of {count} images in data.image_dir {image_dir} cannot be used: "
            f"{_list_first(problems)}; repair or replace them and run the same command again."
        )


def _list_first(names: Sequence[str]) -> str:
    """Returns the first `MAX_LISTED` names and the number of the others."""
    more = f", and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return "; ".join(names[:MAX_LISTED]) + more


def _images_name(texts_name: str, data: Data, records: Mapping[str, str]) -> str:
    """Returns the texts' name with a digest of the sizes and modification times of the image files.

    If image files are missing, as on a machine that only has the prepared datasets, it is the name
    of the dataset prepared last.

    Raises:
      DataError: image files are missing, and no dataset of them was prepared before.
    """
    image_dir = Path(data.image_dir).expanduser()
    states = _file_states(image_dir, list(records))
    missing = [path for path, state in zip(records, states) if state is None]
    if not missing:
        return f"{texts_name}_{hashlib.sha256(repr(states).encode()).hexdigest()[:16]}"
    names = _list_first([f"{path} (record {records[path]!r})" for path in missing])
    problem = f"data.image_dir {image_dir} lacks {len(missing)} of {len(records)} images: {names}"
    datasets = Path(data.dir).expanduser() / ConversationImages.name
    pattern = f"{texts_name}_*/{ConversationImages.VERSION}/dataset_info.json"
    prepared = list(datasets.glob(pattern))
    if not prepared:
        raise DataError(f"{problem}.")
    _print_once(f"{problem}; using the dataset that was prepared last")
    return max(prepared, key=os.path.getmtime).parents[1].name


@functools.cache
def _print_once(text: str) -> None:
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
