"""The section `data`, and the sources of its mixture."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from vlm_jax.config.datasets import DATASETS, Dataset, restricted_fields, source_format
from vlm_jax.config.errors import ConfigError
from vlm_jax.config.hints import nearest


@dataclass(frozen=True)
class Source:
    """A source of `data.mixture`: a dataset, or a part of one.

    A field that is None has the value of the same field of the section `data`.
    """

    name: str  # in metrics, such as loss/NAME
    #: share of its examples, relative to the other weights; None for all: data.mixture_temperature
    weight: float | None = None
    source: str | None = None  # as data.source
    files: tuple[str, ...] | None = None  # as data.files
    format: str | None = None  # as data.format
    image_dir: str | None = None  # as data.image_dir
    unreadable_images: str | None = None  # as data.unreadable_images
    image_field: str | None = None  # as data.image_field
    question_field: str | None = None  # as data.question_field
    answer_field: str | None = None  # as data.answer_field
    train_split: str | None = None  # as data.train_split
    template: str | None = None  # as data.template
    transcript: bool | None = None  # as data.transcript
    augment: tuple[str, ...] | None = None  # as data.augment

    @property
    def own_fields(self) -> dict[str, object]:
        """The fields of `Data` that this source sets."""
        values = {name: getattr(self, name) for name in SOURCE_FIELDS}
        return {name: value for name, value in values.items() if value is not None}


# Fields of `Data` that a source of a mixture may set.
SOURCE_FIELDS = tuple(x.name for x in fields(Source) if x.name not in ("name", "weight"))


@dataclass(frozen=True)
class Data:
    #: dataset: a row of `config.datasets.DATASETS`, such as easy_vqa, conversations or tfds:NAME
    source: str = "easy_vqa"
    #: conversations: JSON, Parquet, webdataset, CSV or TSV files, or folders of save_to_disk
    files: tuple[str, ...] = ()
    #: conversations: form of all files, a row of `config.datasets.CONVERSATION_FORMATS`; auto: each
    #: file is recognized
    format: str = "auto"
    image_dir: str = ""  # conversations: folder of the images
    #: several datasets to train on instead of one, as Source(...) in a config file
    mixture: tuple[Source, ...] = ()
    #: T of a mixture without weights: a source of n examples has the weight n^(1/T); 1: in
    #: proportion to n, high: all alike; None: 1
    mixture_temperature: float | None = None
    #: conversations: leave out records with an image that is missing or cannot be decoded, or stop
    unreadable_images: Literal["error", "skip"] = "error"
    image_field: str = "image"  # tfds: feature of the image; empty: text only
    #: tfds: feature of the question; empty: no question, the image is the prompt
    question_field: str = "question"
    answer_field: str = "answer"  # tfds: feature of the answer: a text, several or a class
    dir: str = "~/.cache/vlm_jax/datasets"  # folder of prepared datasets
    image_px: int = 64  # glyphs, digits: height and width of the generated images
    #: glyphs, digits: number of images in the splits train, validation and test
    images: tuple[int, int, int] = (20_000, 1_000, 2_000)
    seed: int = 0  # glyphs, digits: seed of the image generator
    #: glyphs: size in pixels, 6 to 8, of the cell of each typewritten letter; None: not typewritten
    cell_px: int | None = None
    #: glyphs, digits: the text of the image before every question, instead of the image
    transcript: bool = False
    #: glyphs, digits: words and fonts, or digits, that only the test split has: 0, or 1, which
    #: nothing was chosen on
    fold: int = 0
    train_split: str = "train"  # TFDS split to train on, or a slice such as 'train[:90%]'
    questions_per_row: int = 8  # number of questions in a row, which share its image
    text_length: int = 80  # text tokens in a row
    #: conversations longer than a row: truncated, left out, or an error
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    images_per_row: int = 1  # I: conversations: maximum number of images in a row
    #: conversations with images at native resolution: maximum number of patches in a row, all its
    #: images together; None: room for images_per_row images of vision.max_patches
    patches_per_row: int | None = None
    #: prompt format of a conversation (data/templates.py); checkpoint: the chat template or prompt
    #: format of init_from
    template: Literal["plain", "vicuna", "caption", "checkpoint"] = "plain"
    #: augmentations of the training images
    augment: tuple[Literal["mirror", "turn", "shift"], ...] = ("mirror", "shift")
    #: ids of padding, image, newline and end of text
    special_ids: tuple[int, int, int, int] = (0, 1, 2, 3)
    #: ids of each tile tag, the thumbnail's last; empty: one id each, after special_ids
    tag_ids: tuple[tuple[int, ...], ...] = ()
    bos_id: int | None = None  # first token of a conversation
    threads: int = 2  # threads that load and build rows
    prefetch: int = 4  # batches that are prepared in advance

    @property
    def eos_id(self) -> int:
        return self.special_ids[-1]

    @property
    def dataset(self) -> Dataset:
        """Row of `DATASETS` that `source` names.

        Raises:
          ConfigError: the row does not exist.
        """
        key, _, name = self.source.partition(":")
        row = DATASETS.get(key)
        if row is None or row.takes_name != bool(name):
            choices = ", ".join(map(source_format, DATASETS))
            raise ConfigError(
                f"data.source {self.source!r} is unknown{nearest(self.source, DATASETS)}: "
                f"choose one of {choices}."
            )
        return row

    @property
    def parts(self) -> dict[str, "Data"]:
        """The data of each source of the mixture by its name; without a mixture itself, as "".

        Fields that a source does not set and its dataset does not read have their defaults.

        Raises:
          ConfigError: a source names an unknown dataset.
        """
        if not self.mixture:
            return {"": self}
        return {source.name: self.part(source) for source in self.mixture}

    def alone(self, **values) -> "Data":
        """Returns the data of one dataset, without a mixture, with other values of fields."""
        return replace(self, mixture=(), mixture_temperature=None, **values)

    def part(self, source: Source) -> "Data":
        """Returns an entry of `parts`."""
        part = self.alone(**source.own_fields)
        unread = restricted_fields() - {*part.dataset.fields, *source.own_fields}
        return replace(part, **{name: getattr(Data, name) for name in unread})

    @property
    def is_conversations(self) -> bool:
        """Rows are packed with conversations, instead of one image and its questions."""
        return all(part.dataset.conversations is not None for part in self.parts.values())

    @property
    def templates(self) -> set[str]:
        """The prompt formats of all conversations: of training, and `template` of other prompts."""
        return {self.template, *(part.template for part in self.parts.values())}

    def mixture_shares(self, counts: Sequence[int]) -> list[float]:
        """Returns the share of each source of the mixture in the examples; the sum is 1.

        Source: Arivazhagan et al. 2019, "Massively multilingual neural machine translation in the
        wild", temperature-based sampling.

        Args:
          counts: number of examples of each source.
        """
        weights = [source.weight for source in self.mixture]
        if None in weights:
            exponent = 1 / (self.mixture_temperature or 1.0)
            weights = [(count / max(counts)) ** exponent for count in counts]
        return [weight / sum(weights) for weight in weights]
