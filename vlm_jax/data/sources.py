"""Datasets, prepared on first use and read by index: one record per image, with all its questions."""

import contextlib
import fcntl
import functools
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import easy_vqa
import tensorflow_datasets as tfds
from absl import logging

from vlm_jax.config import ConfigError, Data, UserError
from vlm_jax.config.hints import nearest
from vlm_jax.data.synthetic.builder import SyntheticConfig, question_info
from vlm_jax.data.synthetic.digits import Digits
from vlm_jax.data.synthetic.glyphs import Glyphs

SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class Record:
    """An image and what is asked about it: question i has answer i, which is of type i."""

    image_id: int
    image: bytes  # of an image file
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    types: tuple[str, ...]


class EasyVqa(tfds.core.GeneratorBasedBuilder):
    """Coloured shapes on 64 x 64 px and questions about them (PyPI: easy-vqa, MIT), in the order of their ids."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = (
        None  # TFDS 4.9.10 would look for it with importlib_resources, which it does not install
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return question_info(self, image_px=64)

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(
                easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()
            ),
            "test": self._generate_examples(
                easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()
            ),
        }

    def _generate_examples(self, paths, questions):
        asked = defaultdict(list)
        for question, answer, image_id in zip(*questions, strict=True):
            asked[image_id].append((question, answer, _answer_type(answer)))
        for image_id, path in sorted(
            paths.items()
        ):  # a path and not pixels: those would import TensorFlow
            texts, answers, types = zip(*asked[image_id], strict=True)
            yield (
                image_id,
                {
                    "image_id": image_id,
                    "image": path,
                    "questions": texts,
                    "answers": answers,
                    "types": types,
                },
            )


def _answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in SHAPES else "color"


SOURCES = {"easy_vqa": EasyVqa, "glyphs": Glyphs, "digits": Digits}


class Rows:
    """Random access to the rows of a split, as TFDS reads them; images stay encoded.

    Attributes:
      title: the dataset and the split, for error messages.
    """

    def __init__(self, rows, folder: os.PathLike, title: str):
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
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise _damaged(self._folder, error) from error


class Records(Rows):
    """The rows as records."""

    def __getitem__(self, index: int) -> Record:
        row = super().__getitem__(index)
        texts = {
            name: tuple(text.decode() for text in row[name])
            for name in ("questions", "answers", "types")
        }
        return Record(image_id=int(row["image_id"]), image=row["image"], **texts)


def load(data: Data, split: str) -> Records:
    """The records of a split such as 'test' or 'train[:90%]', by index, in a fixed order; prepared if need be.

    Raises ConfigError for an unknown source, an unusable `data.dir`, or a split that does not exist or is empty.
    """
    return Records(*split_rows(builder(data), data, split))


def builder(data: Data) -> tfds.core.DatasetBuilder:
    """Returns the builder of the dataset that `data.source` names in `SOURCES`, prepared.

    Raises:
      ConfigError: the source is unknown, or `data.dir` is unusable.
    """
    if data.source not in SOURCES:
        hint = nearest(data.source, [*SOURCES, "conversations"])
        choices = ", ".join([*SOURCES, "conversations", "tfds:NAME"])
        raise ConfigError(f"data.source {data.source!r} is unknown{hint}: choose one of {choices}")
    make_builder = SOURCES[data.source]
    if data.is_drawn:
        make_builder = functools.partial(make_builder, config=SyntheticConfig.of(data))
    return prepared(make_builder, data)


def split_rows(
    builder: tfds.core.DatasetBuilder, data: Data, split: str
) -> tuple[Sequence, os.PathLike, str]:
    """Arguments of `Rows` for a split. ConfigError names the field of a split that does not exist."""
    if not builder.info.splits:
        raise _damaged(builder.data_path, "it lists no splits")
    field = split_field(data, split)
    images = {
        name: tfds.decode.SkipDecoding()
        for name, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    try:
        count = builder.info.splits[
            split
        ].num_examples  # of a slice that ends before it begins: below 0
        rows = builder.as_data_source(split, decoders=images) if count > 0 else ()
    except (ValueError, KeyError, AssertionError):
        names = ", ".join(builder.info.splits)
        raise ConfigError(
            f"{field} {split!r} is no split: choose {names}, or a slice like 'train[:90%]'"
        ) from None
    if count <= 0:
        sizes = ", ".join(
            f"{name} {info.num_examples}" for name, info in builder.info.splits.items()
        )
        raise ConfigError(
            f"{field} {split!r} is an empty split: take more of the records that there are, {sizes}"
        )
    return rows, builder.data_path, f"data.source {data.source}, split {split!r}"


def split_field(data: Data, split: str) -> str:
    """Returns the field that names a split."""
    return "data.train_split" if split == data.train_split else "eval.split"


def _damaged(folder, reason) -> ConfigError:
    return ConfigError(f"{folder} cannot be read; remove it, to have it prepared again: {reason}")


def prepared(
    make_builder: Callable[..., tfds.core.DatasetBuilder],
    data: Data,
    how: tfds.download.DownloadConfig | None = None,
) -> tfds.core.DatasetBuilder:
    """The builder of a dataset that is in `data.dir`, made now if it is not; `how` has the options of Beam.

    Raises:
      ConfigError: the folder is unusable, or what the dataset is made from cannot be read.
    """
    directory = Path(data.dir).expanduser()
    try:
        return _prepared(make_builder, directory, how)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"data.dir {directory} cannot be used for datasets: {reason}") from error


def _prepared(make_builder, directory: Path, how) -> tfds.core.DatasetBuilder:
    """Processes of one machine take turns."""
    directory.mkdir(parents=True, exist_ok=True)
    with _quiet(), _without_bucket():
        builder = make_builder(data_dir=str(directory), file_format="array_record")
        if builder.is_prepared():
            return builder
        with open(directory / f"{builder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            builder = make_builder(data_dir=str(directory), file_format="array_record")
            if not builder.is_prepared():
                print(f"preparing the dataset {builder.name} in {directory}", flush=True)
                with contextlib.redirect_stdout(io.StringIO()):
                    builder.download_and_prepare(download_config=how)
    return builder


def _without_bucket():
    """Keeps TFDS from looking for the description of a dataset in Google's bucket.

    The look-up would leave an empty temporary folder behind for every dataset that is not prepared.
    """
    return mock.patch.object(tfds.core.DatasetInfo, "initialize_from_bucket", lambda info: None)


@contextlib.contextmanager
def _quiet():
    """Without TFDS's progress bars and warnings; its errors are raised all the same."""
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
