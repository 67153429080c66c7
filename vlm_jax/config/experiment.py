"""The experiment: frozen dataclasses.

Derived values are properties, so that an override on the command line never leaves a stale copy.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from vlm_jax.config.datasets import DATASETS, Dataset, restricted_fields, source_format
from vlm_jax.config.errors import ConfigError
from vlm_jax.config.hints import nearest
from vlm_jax.config.model import PRETRAINED_PARTS, Decoder, Fusion, Lora, Model, Projector, Vision
from vlm_jax.config.tile_maps import has_maps_in_sequence, image_length, longest_image


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
          ConfigError: there is no such row.
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


@dataclass(frozen=True)
class LrMult:
    """Learning rate of each part as a multiple of `optim.learning_rate`; 0 freezes the part."""

    vision: float = 1.0  # multiplier for the image encoder; 0 freezes it
    projector: float = 1.0  # multiplier for the projector; 0 freezes it
    decoder: float = 1.0  # multiplier for the decoder without cross-attention; 0 freezes it
    cross_attention: float = 1.0  # multiplier for cross-attention; 0 freezes it


@dataclass(frozen=True)
class Optim:
    #: adamw, muon (for kernels; AdamW for the rest), or another row of OPTIMIZERS in train/optim.py
    kind: str = "adamw"
    learning_rate: float = 1e-3  # peak learning rate, after warm-up
    lr_mult: LrMult = field(default_factory=LrMult)
    #: multiplier for the gates of cross-attention, on top of lr_mult.cross_attention: a gate is one
    #: number, which Adam moves by at most about the learning rate a step
    gate_lr_mult: float = 1.0
    warmup_steps: int = 100  # steps in which the learning rate rises from 0 to the peak
    final_lr_fraction: float = 0.0  # final learning rate as a fraction of the peak
    beta1: float = 0.9  # decay of the gradients' running mean
    beta2: float = 0.99  # AdamW: decay of the squared gradients' running mean
    weight_decay: float = 1e-4  # weight decay, for matrices only
    clip_norm: float = 1.0  # maximum global norm of the gradient


@dataclass(frozen=True)
class Train:
    steps: int = 1500  # number of optimizer steps, each on batch_size rows
    batch_size: int = 128  # number of rows in a global batch
    #: number of parts of a batch that are computed in sequence, with accumulated gradients
    microbatches: int = 1
    #: dtype of the forward and backward pass; trained parameters, the optimizer and the loss are
    #: float32
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    #: dtype in which frozen parameters are stored; int8 and nf4 (QLoRA) quantize the kernels of
    #: blocks and of the projector, the rest is stored in compute_dtype; None: compute_dtype
    frozen_dtype: Literal["float32", "bfloat16", "int8", "nf4"] | None = None
    #: nf4: store scales in 8 bits; False: in float32, as runs of older versions have them
    double_quantization: bool = True
    #: scored tokens per device whose logits are computed at once; None: all if they fit into 64
    #: MiB, else 512
    loss_chunk: int | None = None
    checkpoint_every_steps: int = 500  # steps between checkpoints
    keep_checkpoints: int = 3  # number of most recent checkpoints to keep
    #: also keep the N checkpoints with the best `best_metric`; a new best one is saved at once
    keep_best: int = 0
    #: score of a validation that ranks checkpoints: SPLIT/loss, SPLIT/METRIC such as
    #: val/exact_match, or SPLIT/loss/NAME for a source of data.mixture; None: the loss of the first
    #: split of eval.splits; without validation the mean training loss since the last checkpoint
    best_metric: str | None = None
    #: end the run after N validations in sequence without a better best_metric; None: never
    patience: int | None = None
    keep_every_steps: int | None = None  # also keep the checkpoint of every N-th step
    log_every_steps: int = 20  # steps between logged rows
    #: services that get the metrics, too: rows of TRACKERS in train/trackers.py, such as wandb
    trackers: tuple[str, ...] = ()
    #: "10:13": write a jax.profiler trace of steps 10 to 13 to the work folder; empty: none
    profile_steps: str = ""
    #: folder of compiled programs, reused by later runs; empty: off
    compilation_cache_dir: str = "~/.cache/vlm_jax/compiled"

    @property
    def quantizes_frozen(self) -> bool:
        """Frozen kernels are stored in 8 or 4 bits."""
        return self.frozen_dtype in ("int8", "nf4")

    @property
    def frozen_format(self) -> str:
        """Format of the frozen kernels, if they are quantized: a row of `FORMATS` in nn."""
        is_single = self.frozen_dtype == "nf4" and not self.double_quantization
        return "nf4_single" if is_single else self.frozen_dtype

    @property
    def frozen_float_dtype(self) -> str:
        """Dtype of the frozen parameters that are not quantized."""
        if self.frozen_dtype is None or self.quantizes_frozen:
            return self.compute_dtype
        return self.frozen_dtype

    @property
    def profiled(self) -> range:
        """The range of `profile_steps`, which must be valid."""
        if not self.profile_steps:
            return range(0)
        first, last = map(int, self.profile_steps.split(":"))
        return range(first, last + 1)


def factorizations(number: int) -> list[tuple[int, int, int]]:
    """Every (a, b, c) whose product is the number, the largest a first."""
    divisors = [d for d in range(number, 0, -1) if number % d == 0]
    return [(a, b, number // (a * b)) for a in divisors for b in divisors if number % (a * b) == 0]


@dataclass(frozen=True)
class Mesh:
    data: int = -1  # devices for data parallelism; -1: all remaining
    fsdp: int = 1  # devices that shard rows and parameters; -1: all remaining
    tensor: int = 1  # devices for tensor parallelism; -1: all remaining

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """Returns the sizes of the mesh axes, with -1 replaced by the remaining devices.

        Raises:
          ConfigError: the sizes do not multiply to the number of devices.
        """
        axes = (self.data, self.fsdp, self.tensor)
        known = math.prod(size for size in axes if size != -1)
        free = axes.count(-1)
        positive = all(size > 0 for size in axes if size != -1)
        if free <= 1 and positive and devices % known == 0 and (free or known == devices):
            return tuple(devices // known if size == -1 else size for size in axes)
        nearest = sorted(
            factorizations(devices), key=lambda sizes: sum(a != b for a, b in zip(sizes, axes))
        )
        # The nearest first, which keep most of the given sizes.
        choices = [" x ".join(map(str, sizes)) for sizes in nearest[:12]]
        if len(nearest) > 12:
            choices.append("or another")
        raise ConfigError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {' x '.join(map(str, axes))} does not fit "
            f"{devices} device(s): the three must multiply to {devices}, and at most one may be -1 "
            "(all remaining): choose "
            f"{', '.join(choices)}."
        )


@dataclass(frozen=True)
class Distributed:
    """Processes that train together; on TPU VMs, GKE and Slurm they are found automatically."""

    coordinator_address: str = ""  # HOST:PORT of process 0
    #: number of processes; None: from the cluster, or one without a cluster; 1: no other process
    num_processes: int | None = None
    process_id: int | None = None  # index of this process, from 0; None: from the cluster
    timeout_seconds: int = 300  # how long processes wait for each other at the start
    #: a process that is silent for this long is declared dead, and the run ends
    heartbeat_seconds: int = 60

    def check(self) -> None:
        """Raises ConfigError for fields that are incomplete or contradict each other."""
        address, count, index = self.coordinator_address, self.num_processes, self.process_id
        if count == 1 and not address and not index:
            return
        named = {
            "coordinator_address": bool(address),
            "num_processes": count is not None,
            "process_id": index is not None,
        }
        missing = [f"distributed.{name}" for name, is_given in named.items() if not is_given]
        if len(missing) == len(named):
            return
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: "
                "distributed.coordinator_address, distributed.num_processes and "
                "distributed.process_id are set together, or left out on a cluster that sets them."
            )
        _, _, port = address.rpartition(":")
        if not re.fullmatch(r"[^\s/]+:[0-9]{1,5}", address) or not 0 < int(port) < 2**16:
            raise ConfigError(
                f"distributed.coordinator_address {address!r} is not HOST:PORT, "
                "such as 10.0.0.2:8476."
            )
        if index >= count:
            raise ConfigError(
                f"distributed.process_id {index} is not in 0 to {count - 1} "
                f"(distributed.num_processes {count})."
            )


@dataclass(frozen=True)
class Eval:
    split: str = "test"  # TFDS split to evaluate on; empty: no evaluation
    files: tuple[str, ...] = ()  # conversations: files to evaluate on instead of data.files
    source: str = ""  # name of a source of data.mixture to evaluate on; empty: all of them
    max_examples: int | None = None  # maximum number of examples to evaluate; None: all
    batch_size: int = 256  # number of questions in a batch
    max_new_tokens: int = 8  # maximum length of an answer in tokens
    #: rows of METRICS in infer/metrics/table.py, such as vqa_accuracy or anls
    metrics: tuple[str, ...] = ("exact_match",)
    #: conversations: questions to ask; all: each after the true turns before it
    turns: Literal["first", "all"] = "first"
    every_steps: int | None = None  # steps between validations on `splits`; None: no validation
    #: splits to validate on while training, each NAME=SPLIT, such as val=train[90%:] (a split of
    #: `files` if set), or NAME=FILE for conversations
    splits: tuple[str, ...] = ()
    #: first questions of each split that a validation answers and scores; 0: loss alone
    during_examples: int = 500

    @property
    def named_splits(self) -> dict[str, str]:
        """Name -> split or file, of `splits`."""
        pairs = [entry.partition("=") for entry in self.splits]
        return {name: split or name for name, _, split in pairs}

    @property
    def read_split(self) -> str:
        """The split to evaluate on: all of `files` unless `split` is a slice of 'train'.

        Empty: no evaluation.
        """
        if self.files and self.split in ("", Eval.split):
            return "train"
        return self.split

    @property
    def title(self) -> str:
        """The evaluated data, for messages."""
        return f"{self.read_split} of {', '.join(self.files)}" if self.files else self.read_split


@dataclass(frozen=True)
class Experiment:
    data: Data = field(default_factory=Data)
    vision: Vision = field(default_factory=Vision)
    projector: Projector = field(default_factory=Projector)
    fusion: Fusion = field(default_factory=Fusion)
    decoder: Decoder = field(default_factory=Decoder)
    # Not a factory: config.json of older runs lacks the section.
    lora: Lora = Lora()
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)
    distributed: Distributed = field(default_factory=Distributed)
    eval: Eval = field(default_factory=Eval)
    #: folder of a public checkpoint or of a run: its model, tokenizer and initial weights
    init_from: str = ""
    #: the parts of init_from to use; (): all
    init_parts: tuple[Literal["vision", "projector", "decoder"], ...] = ()
    #: folder of a LoRA adapter of init_from, in PEFT's format: its training continues
    adapter: str = ""
    workdir: str = ""  # folder of the run; empty: runs/<config name>
    seed: int = 0  # seed of new parameters and of the order of the data

    @property
    def begins_with_any(self) -> bool:
        """True if a checkpoint is named, whose settings replace the experiment's."""
        return bool(self.init_from or self.pretrained_parts)

    @property
    def pretrained_parts(self) -> tuple[str, ...]:
        """Parts that are initialized from a checkpoint."""
        return tuple(part for part in PRETRAINED_PARTS if getattr(self, part).checkpoint)

    @property
    def eval_data(self) -> Data:
        """The dataset that `eval.read_split` is a split of."""
        if self.eval.files:
            return self.data.alone(files=self.eval.files)
        return self.data.parts[self.eval.source] if self.eval.source else self.data

    @property
    def parts(self) -> dict[str, "Experiment"]:
        """The experiment with the data of each source of the mixture, as `Data.parts`."""
        return {name: replace(self, data=part) for name, part in self.data.parts.items()}

    def validation_data(self, split: str) -> Data:
        """The dataset of a value of `eval.named_splits`, which is its `train_split`.

        Images are not augmented. Conversations have no other split than train: all other values are
        files. Of a mixture it is the split of every source.
        """
        data = replace(self.eval_data, train_split=split, augment=())
        if "files" in data.dataset.fields and split.partition("[")[0] != "train":
            return data.alone(files=(split,), train_split="train")
        sources = (replace(source, train_split=None, augment=None) for source in data.mixture)
        return replace(data, mixture=tuple(sources))

    @property
    def model(self) -> Model:
        """The sections that `nn/` builds the model from."""
        return Model(self.vision, self.projector, self.fusion, self.decoder, self.lora)

    @property
    def image_tokens(self) -> int:
        """M: number of tokens of one view of an image after the projector."""
        return self.model.image_tokens

    @property
    def views_in_sequence(self) -> int:
        """Maximum number of views of an image in the decoder's sequence."""
        if not self.fusion.image_in_sequence:
            return 0
        return 1 if self.fusion.splits_views else self.vision.views

    @property
    def has_maps_in_sequence(self) -> bool:
        """True if image tokens are in the sequence as maps of tiles."""
        return has_maps_in_sequence(self.vision, self.fusion)

    @property
    def tile_tags(self) -> tuple[tuple[int, ...], ...]:
        """Ids of the text tokens that name each of the J views of an image; empty without tags."""
        # The tokens of a map have their place in the sequence, but not in cross-attention.
        is_named = self.vision.has_tags and not self.has_maps_in_sequence
        if not (is_named and self.fusion.has_images):
            return ()
        first = max(self.data.special_ids) + 1
        return self.data.tag_ids or tuple((first + view,) for view in range(self.vision.views))

    @property
    def image_slots_in_row(self) -> int:
        """Maximum length of an image in the sequence, with newlines, tags and placeholder."""
        if self.has_maps_in_sequence:
            longest = longest_image(self.vision, self.projector)
            return image_length(self.vision, self.projector, longest)
        newlines = self.projector.output_grid(self.vision)[0] if self.vision.newline_token else 0
        beside = sum(map(len, self.tile_tags)) + self.fusion.placeholder
        return self.views_in_sequence * (self.image_tokens + newlines) + beside

    @property
    def row_length(self) -> int:
        """S: length of a training row in tokens."""
        image_slots = self.data.images_per_row * self.image_slots_in_row
        if self.vision.is_native and self.fusion.image_in_sequence:
            image_slots = self.image_tokens_per_row
            image_slots += self.data.images_per_row * self.fusion.placeholder
        return image_slots + self.data.text_length

    @property
    def image_tokens_per_row(self) -> int:
        """Maximum number of image tokens of a training row at native resolution."""
        if self.model.has_tokens_by_size:
            return self.squares_per_row
        return self.data.images_per_row * self.image_tokens

    @property
    def squares_per_row(self) -> int:
        """Maximum number of squares of patches in a training row at native resolution."""
        if self.data.patches_per_row is None:
            return self.data.images_per_row * self.vision.max_squares
        return self.data.patches_per_row // self.vision.patch_square**2

    @property
    def patches_per_row(self) -> int | None:
        """P: number of patches in a training row at native resolution, with padding, or None."""
        if not self.vision.is_native:
            return None
        return self.squares_per_row * self.vision.patch_square**2
