"""Datasets: one row each. What a value of `data.source` means is read from its row."""

from dataclasses import dataclass

SYNTHETIC_FIELDS = ("image_px", "images", "seed", "transcript", "fold")


@dataclass(frozen=True)
class Dataset:
    """A row of `DATASETS`. It has a `builder` or a `conversations`, not both.

    Attributes:
      builder: "module:class" of a `data.builders.records.RecordBuilder`: a row is one image with
        its questions.
      conversations: a module with `load(data, split)` and `fingerprint(data)`: rows are packed with
        conversations. An example is `data/tfds_vqa.py`.
      fields: fields of `Data` that this dataset reads and some others do not.
      allows_augment: the answers stay true if the pixels of an image are mirrored, turned or moved.
      takes_name: `data.source` is KEY:NAME instead of KEY.
      has_boxes: the builder knows where in an image the object of a question is.
    """

    builder: str | None = None
    conversations: str | None = None
    fields: tuple[str, ...] = ()
    allows_augment: bool = False
    takes_name: bool = False
    has_boxes: bool = False


@dataclass(frozen=True)
class ConversationFormat:
    """A row of `CONVERSATION_FORMATS`.

    Attributes:
      module: has `recognize(path, head)`, given the first bytes of a file, and `read(path)`, which
        yields the location of each record and the record (data/forms/layouts.py) or its fault.
      layout: the only layout of records that is read; "": any, and files may be recognized as this.
    """

    module: str
    layout: str = ""


AUTO = "auto"  # value of data.format: every file is recognized
# A file is of the first form that recognizes it.
CONVERSATION_FORMATS = {
    "arrow": ConversationFormat("vlm_jax.data.forms.arrow"),
    "parquet": ConversationFormat("vlm_jax.data.forms.parquet"),
    "webdataset": ConversationFormat("vlm_jax.data.forms.webdataset"),
    "csv": ConversationFormat("vlm_jax.data.forms.tables"),
    "json": ConversationFormat("vlm_jax.data.forms.json_files"),
    # LLaVA's form is ShareGPT's with images.
    "llava": ConversationFormat("vlm_jax.data.forms.json_files", "conversations"),
    "sharegpt": ConversationFormat("vlm_jax.data.forms.json_files", "conversations"),
    "openai": ConversationFormat("vlm_jax.data.forms.json_files", "messages"),
}

DATASETS = {
    "easy_vqa": Dataset(
        builder="vlm_jax.data.builders.easy_vqa:EasyVqa", allows_augment=True, has_boxes=True
    ),
    "glyphs": Dataset(
        builder="vlm_jax.data.synthetic.glyphs:Glyphs",
        fields=(*SYNTHETIC_FIELDS, "cell_px"),
        has_boxes=True,
    ),
    "digits": Dataset(
        builder="vlm_jax.data.synthetic.digits:Digits",
        fields=SYNTHETIC_FIELDS,
        has_boxes=True,
    ),
    "conversations": Dataset(
        conversations="vlm_jax.data.conversations",
        fields=(
            "files",
            "image_dir",
            "format",
            "unreadable_images",
            "too_long",
            "images_per_row",
            "patches_per_row",
        ),  # fmt: skip
    ),
    "tfds": Dataset(
        conversations="vlm_jax.data.tfds_vqa",
        fields=(
            *("image_field", "question_field", "answer_field"),
            *("too_long", "images_per_row", "patches_per_row"),
        ),
        takes_name=True,
    ),
}


def source_format(key: str) -> str:
    """Returns the form of `data.source` for a row: "tfds:NAME" for "tfds"."""
    return f"{key}:NAME" if DATASETS[key].takes_name else key


def restricted_fields() -> set[str]:
    """Returns the fields of `Data` that some datasets read and some do not."""
    return {name for dataset in DATASETS.values() for name in dataset.fields}


def sources_that_read(field: str) -> list[str]:
    """Returns the forms of `data.source` whose datasets read a field of `Data`."""
    return [source_format(key) for key, dataset in DATASETS.items() if field in dataset.fields]
