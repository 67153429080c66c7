"""Datasets that TFDS prepares on first use and that are read by index."""

import contextlib
import fcntl
import functools
import importlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from vlm_jax.config import ConfigError, Data, UserError
from vlm_jax.data.builders.records import Record


class Rows:
    """Random access to the rows of a split, as TFDS reads them; images stay encoded.

    Attributes:
      title: the dataset and the split, for error messages.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], folder: os.PathLike, title: str):
        self._rows = rows
        self._folder = folder
        self.title = title

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int):
        try:
            return self._rows[index]
        except Exception as error:  # of any type: the readers meet arbitrary bytes
            raise _damaged(self._folder, error) from error


class Records(Rows):
    """Random access to the records of a split."""

    def __getitem__(self, index: int) -> Record:
        row = super().__getitem__(index)
        return Record(
            image_id=int(row["image_id"]),
            image=row["image"],
            questions=_decode(row["questions"]),
            answers=_decode(row["answers"]),
            types=_decode(row["types"]),
        )


def _decode(texts: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(text.decode() for text in texts)


def load(data: Data, split: str) -> Records:
    """Returns the records of a split such as 'test' or 'train[:90%]', in a fixed order.

    Prepares the dataset if necessary.

    Raises:
      ConfigError: the source is unknown, `data.dir` cannot be used, or the split does not exist or
        is empty.
    """
    return Records(*split_rows(builder(data), data, split))


def builder(data: Data) -> tfds.core.DatasetBuilder:
    """Returns the prepared builder of a dataset of records.

    Raises:
      ConfigError: the source is unknown, or `data.dir` cannot be used.
    """
    module, _, name = data.dataset.builder.partition(":")
    builder_class = getattr(importlib.import_module(module), name)
    return prepared(functools.partial(builder_class, **builder_class.settings(data)), data)


def fingerprint(info: tfds.core.DatasetInfo, data: Data) -> dict[str, str]:
    """Returns the name, version, configuration and sizes of a prepared dataset."""
    sizes = {
        f"{info.name}, split {name}": str(split.num_examples) for name, split in info.splits.items()
    }
    return {data.source: info.full_name} | sizes


def split_rows(
    builder: tfds.core.DatasetBuilder, data: Data, split: str
) -> tuple[Sequence, os.PathLike, str]:
    """Returns the arguments of `Rows` for a split.

    Raises:
      ConfigError: the split does not exist or is empty; the message has the field that names it.
    """
    if not builder.info.splits:
        raise _damaged(builder.data_path, "it lists no splits")
    field = split_field(data, split)
    images = {
        name: tfds.decode.SkipDecoding()
        for name, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    try:
        # A slice that ends before it begins has a negative count.
        count = builder.info.splits[split].num_examples
        rows = builder.as_data_source(split, decoders=images) if count > 0 else ()
    except (ValueError, KeyError, AssertionError):
        names = ", ".join(builder.info.splits)
        raise ConfigError(
            f"{field} {split!r} does not exist: choose {names}, or a slice like 'train[:90%]'."
        ) from None
    if count <= 0:
        sizes = ", ".join(
            f"{name} {info.num_examples}" for name, info in builder.info.splits.items()
        )
        raise ConfigError(f"{field} {split!r} is an empty split: choose a part of {sizes}.")
    return rows, builder.data_path, f"data.source {data.source}, split {split!r}"


def split_field(data: Data, split: str) -> str:
    """Returns the field that names a split."""
    return "data.train_split" if split == data.train_split else "eval.split"


def _damaged(folder: os.PathLike, reason: object) -> ConfigError:
    return ConfigError(f"cannot read {folder}: {reason}. Remove it, and it is prepared again.")


def prepared(
    make_builder: Callable[..., tfds.core.DatasetBuilder],
    data: Data,
    download_config: tfds.download.DownloadConfig | None = None,
) -> tfds.core.DatasetBuilder:
    """Returns the builder of a dataset in `data.dir`; prepares the dataset if necessary.

    Args:
      make_builder: takes `data_dir` and `file_format`.
      data: its `dir` is the folder.
      download_config: may hold options of Beam.

    Raises:
      ConfigError: the folder cannot be used, or the files that the dataset is made from cannot be
        read.
    """
    directory = Path(os.path.expanduser(data.dir))
    try:
        return _prepared(make_builder, directory, download_config)
    except UserError:
        raise
    except Exception as error:  # of any type: the readers meet arbitrary bytes
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"data.dir {directory} cannot be used for datasets: {reason}.") from error


def _prepared(make_builder, directory: Path, download_config) -> tfds.core.DatasetBuilder:
    """Builds the dataset under a file lock, one process of a machine at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"data_dir": str(directory), "file_format": "array_record"}
    with _quiet():
        builder = make_builder(**settings)
        if builder.is_prepared():
            return builder
        with open(directory / f"{builder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Another process may have prepared it while this one waited.
            builder = make_builder(**settings)
            if not builder.is_prepared():
                print(f"preparing the dataset {builder.name} in {directory}", flush=True)
                with contextlib.redirect_stdout(io.StringIO()):
                    builder.download_and_prepare(download_config=download_config)
    return builder


@contextlib.contextmanager
def _quiet():
    """Silences TFDS's progress bars and warnings; its errors are raised all the same."""
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
