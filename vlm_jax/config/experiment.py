"""What an experiment is: frozen dataclasses.

Derived values are properties, so an override on the command line can never leave a stale copy behind.
"""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

from vlm_jax.config.errors import ConfigError
from vlm_jax.config.model import Decoder, Fusion, Model, Projector, Vision


@dataclass(frozen=True)
class Data:
    #: dataset: one of `data.sources.SOURCES`, conversations (of `files`), or tfds:NAME
    source: str = "easy_vqa"
    files: tuple[str, ...] = ()  # conversations: JSON or JSONL files in LLaVA's format
    image_dir: str = ""  # conversations: the folder in which their images lie
    image_field: str = "image"  # tfds: the feature that holds the image; empty: text only
    #: tfds: the feature that holds the question; empty: the image alone is asked about
    question_field: str = "question"
    answer_field: str = "answer"  # tfds: the feature that holds the answer, text or a class
    dir: str = "~/.cache/vlm_jax/datasets"  # where datasets are prepared on first use
    image_px: int = 64  # glyphs, digits: height and width of an image as it is drawn
    #: glyphs, digits: of the splits train, validation and test
    images: tuple[int, int, int] = (20_000, 1_000, 2_000)
    seed: int = 0  # glyphs, digits: another one draws other images
    #: glyphs: letters are typewritten, each in a cell of so many pixels, 6 to 8; 0: set freely
    cell_px: int = 0
    transcript: bool = False  # glyphs: what stands on the page is said before every question
    train_split: str = "train"  # TFDS split to learn from; slices such as 'train[:90%]' are allowed
    questions_per_row: int = 8  # questions that share one image in a row; 1: one question a row
    text_length: int = 80  # text tokens in a row; a conversation that is longer than its row is cut
    images_per_row: int = 1  # I: images in a row of conversations, at the most
    #: form of a conversation: data/templates.py; checkpoint: the chat template or prompt form of the checkpoint that
    #: `init_from` names
    template: Literal["plain", "vicuna", "caption", "checkpoint"] = "plain"
    #: moves of the training images
    augment: tuple[Literal["mirror", "turn", "shift"], ...] = ("mirror", "shift")
    #: tokens that stand for padding, image, newline, end of text
    special_ids: tuple[int, int, int, int] = (0, 1, 2, 3)
    #: tokens of every tile tag, and last of the thumbnail's; empty: one each, after the special ones
    tag_ids: tuple[tuple[int, ...], ...] = ()
    bos_id: int = -1  # token that begins a conversation; -1: none does
    threads: int = 2  # threads that read and build rows
    prefetch: int = 4  # batches made ahead of the step

    @property
    def eos_id(self) -> int:
        return self.special_ids[-1]

    @property
    def is_drawn(self) -> bool:
        """Whether the images are drawn on first use, as `image_px`, `images` and `seed` say."""
        return self.source in ("glyphs", "digits")

    @property
    def is_conversations(self) -> bool:
        """Whether rows are packed with conversations, and not with one image and its questions."""
        return self.source == "conversations" or self.source.startswith("tfds:")


@dataclass(frozen=True)
class LrMult:
    """Learning rate of a part as a multiple of `optim.learning_rate`; 0 freezes the part."""

    vision: float = 1.0  # of the image encoder's learning rate; 0 freezes it
    projector: float = 1.0  # of the projector's learning rate; 0 freezes it
    decoder: float = 1.0  # of the decoder's learning rate, cross-attention apart; 0 freezes it
    cross_attention: float = 1.0  # of cross-attention's learning rate; 0 freezes it


@dataclass(frozen=True)
class Optim:
    kind: Literal["adamw", "muon"] = "adamw"  # muon: for kernels; all else is AdamW's as before
    learning_rate: float = 1e-3  # the peak, after warm-up
    lr_mult: LrMult = field(default_factory=LrMult)
    warmup_steps: int = 100  # steps in which the learning rate rises from 0 to its peak
    final_lr_fraction: float = 0.0  # the cosine ends at this share of the peak
    beta1: float = 0.9  # decay of the mean of the gradients
    beta2: float = 0.99  # AdamW: decay of the mean of their squares
    weight_decay: float = 1e-4  # of matrices only
    clip_norm: float = 1.0  # global norm of the gradient


@dataclass(frozen=True)
class Train:
    steps: int = 1500  # optimizer steps, each on a batch of batch_size rows
    batch_size: int = 128  # rows in a global batch
    #: parts of a batch that are computed one after the other, their gradients added
    microbatches: int = 1
    #: of the forward and backward pass and of frozen parts; trained parameters, the optimizer and the loss are float32
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    #: scored tokens of a device whose logits are there at once; 0: all, or 512, as fits 64 MiB
    loss_chunk: int = 0
    checkpoint_every_steps: int = 500  # steps from one checkpoint to the next
    keep_checkpoints: int = 3  # the last so many
    #: and so many more: those with the lowest mean training loss since the checkpoint before
    keep_best: int = 0
    keep_every_steps: int = 0  # and those of every so many steps, for good; 0: none
    log_every_steps: int = 20  # steps from one logged row to the next
    #: "10:13": a jax.profiler trace of steps 10 to 13 in the work folder; empty: none
    profile_steps: str = ""
    #: what was compiled is found there again; empty: off
    compilation_cache_dir: str = "~/.cache/vlm_jax/compiled"

    @property
    def profiled(self) -> range:
        """The steps of `profile_steps`, once it is validated."""
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
    data: int = -1  # devices along the axis of data parallelism; -1: what is left
    fsdp: int = 1  # devices along the axis that shards rows and parameters; -1: what is left
    tensor: int = 1  # devices along the axis of tensor parallelism; -1: what is left

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """The axes with -1 filled in.

        Raises:
          ConfigError: they do not multiply to the number of devices.
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
        choices = [
            " x ".join(map(str, sizes)) for sizes in nearest[:12]
        ]  # those first that keep what was given
        raise ConfigError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {' x '.join(map(str, axes))} does not fit {devices} device(s): "
            f"the three must multiply to {devices}, and at most one may be -1 (what is left): choose "
            f"{', '.join(choices)}{', or another' * (len(nearest) > 12)}."
        )


@dataclass(frozen=True)
class Distributed:
    """Which processes train together; on TPU VMs, GKE and Slurm they know it without these fields."""

    coordinator_address: str = ""  # HOST:PORT at which process 0 awaits the others
    #: 0: what the cluster says, one process where there is none; 1: this one alone
    num_processes: int = 0
    process_id: int = -1  # of this process, from 0; -1: what the cluster says
    timeout_seconds: int = 300  # how long the processes wait for each other at the start
    heartbeat_seconds: int = 60  # one that gave no sign for so long is lost, and the others end

    def check(self) -> None:
        """Raises ConfigError for fields that do not fit each other."""
        address, count, index = self.coordinator_address, self.num_processes, self.process_id
        if count == 1 and not address and index < 1:
            return
        named = {
            "coordinator_address": bool(address),
            "num_processes": count > 0,
            "process_id": index >= 0,
        }
        missing = [f"distributed.{name}" for name, is_given in named.items() if not is_given]
        if len(missing) == len(named):
            return
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: "
                "distributed.coordinator_address, distributed.num_processes and distributed.process_id are given "
                "together, or none of them, where the cluster says them."
            )
        _, _, port = address.rpartition(":")
        if not re.fullmatch(r"[^\s/]+:[0-9]{1,5}", address) or not 0 < int(port) < 2**16:
            raise ConfigError(
                f"distributed.coordinator_address {address!r} is no HOST:PORT, such as 10.0.0.2:8476."
            )
        if index >= count:
            raise ConfigError(
                f"distributed.process_id {index} is not among 0 to {count - 1} of distributed.num_processes {count}."
            )


@dataclass(frozen=True)
class Eval:
    split: str = "test"  # TFDS split to evaluate on; empty: no evaluation
    files: tuple[str, ...] = ()  # conversations: JSON files to evaluate on instead of data.files
    max_examples: int = 0  # 0: all
    batch_size: int = 256  # questions at a time
    max_new_tokens: int = 8  # the longest answer

    @property
    def read_split(self) -> str:
        """The split to evaluate on: all of `files` unless `split` is a part of 'train'; empty: no evaluation."""
        if self.files and self.split in ("", Eval.split):
            return "train"
        return self.split

    @property
    def title(self) -> str:
        """What is evaluated on, for messages."""
        return f"{self.read_split} of {', '.join(self.files)}" if self.files else self.read_split


@dataclass(frozen=True)
class Experiment:
    data: Data = field(default_factory=Data)
    vision: Vision = field(default_factory=Vision)
    projector: Projector = field(default_factory=Projector)
    fusion: Fusion = field(default_factory=Fusion)
    decoder: Decoder = field(default_factory=Decoder)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)
    distributed: Distributed = field(default_factory=Distributed)
    eval: Eval = field(default_factory=Eval)
    #: folder of a public checkpoint or of a run: its model, tokenizer and weights to begin with
    init_from: str = ""
    #: only these parts of init_from; (): all of it
    init_parts: tuple[Literal["vision", "projector", "decoder"], ...] = ()
    workdir: str = ""  # where the run is kept; empty: runs/<config name>
    seed: int = 0  # of new parameters and of the order of the data

    @property
    def begins_with_any(self) -> bool:
        """Whether a folder is named whose settings are to be taken over."""
        return bool(self.init_from or self.pretrained_parts)

    @property
    def pretrained_parts(self) -> tuple[str, ...]:
        """Parts that begin with a checkpoint."""
        return tuple(
            part for part in ("vision", "projector", "decoder") if getattr(self, part).checkpoint
        )

    @property
    def eval_data(self) -> Data:
        """The dataset that `eval.read_split` is a split of."""
        return replace(self.data, files=self.eval.files) if self.eval.files else self.data

    @property
    def model(self) -> Model:
        """The sections that `nn/` builds a model from."""
        return Model(self.vision, self.projector, self.fusion, self.decoder)

    @property
    def image_tokens(self) -> int:
        """M: tokens of one image, or of one view of it, after the projector."""
        return self.model.image_tokens

    @property
    def views_in_sequence(self) -> int:
        """Views of an image whose tokens stand in the decoder's sequence, at the most; of hybrid the whole image."""
        if not self.fusion.image_in_sequence:
            return 0
        return 1 if self.fusion.splits_views else self.vision.views

    @property
    def tile_tags(self) -> tuple[tuple[int, ...], ...]:
        """The tokens that name each of the J views of an image in the text; empty where there are no tags."""
        if not (self.vision.has_tags and self.fusion.has_images):
            return ()
        first = max(self.data.special_ids) + 1
        return self.data.tag_ids or tuple((first + view,) for view in range(self.vision.views))

    @property
    def image_slots_in_row(self) -> int:
        """Slots that one image takes in the decoder's sequence at most: newlines, tags and placeholder included."""
        newlines = self.projector.output_grid(self.vision)[0] if self.vision.newline_token else 0
        beside = sum(map(len, self.tile_tags)) + self.fusion.placeholder
        return self.views_in_sequence * (self.image_tokens + newlines) + beside

    @property
    def row_length(self) -> int:
        """S: tokens of a training row."""
        return self.data.images_per_row * self.image_slots_in_row + self.data.text_length
