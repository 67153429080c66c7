"""What an experiment is: frozen dataclasses.

Derived values are properties, so an override on the command line can never leave a stale copy behind.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

CHANNELS = 3  # red, green, blue


class ConfigError(ValueError):
    """A mistake of the user, in one sentence that names the field and the valid choices."""


@dataclass(frozen=True)
class Data:
    source: str = "easy_vqa"  # dataset: one of `data.sources.SOURCES`
    dir: str = "~/.cache/vlm_jax/datasets"  # where datasets are prepared on first use
    train_split: str = "train"  # TFDS split to learn from; slices such as 'train[:90%]' are allowed
    questions_per_row: int = 8  # questions that share one image in a row; 1: one question a row
    text_length: int = 80  # text tokens in a row
    augment: tuple[Literal["mirror", "turn", "shift"], ...] = ("mirror", "shift")  # moves of the training images
    threads: int = 2  # threads that read and build rows
    prefetch: int = 4  # batches made ahead of the step


@dataclass(frozen=True)
class Transformer:
    """What the image encoder and the decoder have in common; public families are settings of it."""

    width: int = 128  # D: numbers of a token
    depth: int = 4  # blocks
    heads: int = 4  # N: attention heads
    kv_heads: int = 0  # K: key/value heads (grouped-query attention); 0: as many as heads
    head_dim: int = 0  # H: numbers of a head; 0: width / heads
    mlp_width: int = 512  # F: hidden numbers of the MLP
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-6  # added to the variance
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2"] = "gelu_tanh"
    gated_mlp: bool = False  # down(act(gate x) * up x) instead of down(act(up x))
    qkv_bias: bool = True  # biases of the query, key and value projections
    out_bias: bool = True  # bias of attention's output projection
    mlp_bias: bool = True  # biases of the MLP
    unroll: int = 1  # blocks (or periods of blocks) laid out per turn of the loop over depth; more: slower to compile

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.width // self.heads


@dataclass(frozen=True)
class Vision(Transformer):
    kind: Literal["vit", "none"] = "vit"  # none: patches go straight to the projector (Fuyu)
    image_size_px: int = 64  # height and width of an image
    patch_size_px: int = 8
    patch_embed: Literal["linear", "conv"] = "linear"  # the same numbers, computed as a product or a convolution
    patch_bias: bool = True
    positions: Literal["learned", "sincos", "none"] = "learned"
    class_token: bool = False  # a learned token in front of the patches
    keep_class_token: bool = False  # hand it on to the projector
    pre_norm: bool = False  # a norm before the first block (CLIP)
    final_norm: bool = True  # a norm after the last block
    newline_token: bool = False  # unified: a text token after every row of image tokens (Fuyu)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.image_size_px // self.patch_size_px,) * 2

    @property
    def patch_dim(self) -> int:
        """C: numbers of one flattened patch."""
        return self.patch_size_px**2 * CHANNELS

    @property
    def output_width(self) -> int:
        """E: numbers of a token that reaches the projector."""
        return self.width if self.kind == "vit" else self.patch_dim

    @property
    def extra_tokens(self) -> int:
        """Tokens beside the grid that reach the projector."""
        return int(self.kind == "vit" and self.class_token and self.keep_class_token)


@dataclass(frozen=True)
class Projector:
    kind: Literal["linear", "mlp", "pixel_shuffle", "average_pool", "resampler"] = "linear"
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"  # of mlp
    factor: int = 2  # pixel_shuffle, average_pool: factor x factor tokens become one
    queries: int = 16  # resampler: tokens that it emits
    depth: int = 2  # resampler: blocks
    heads: int = 4  # resampler: attention heads

    def output_grid(self, vision: Vision) -> tuple[int, int]:
        """Rows and columns of the tokens that the projector emits for one image (one row where there is no grid)."""
        rows, columns = vision.grid
        if self.kind == "resampler":
            return 1, self.queries
        if self.kind in ("pixel_shuffle", "average_pool"):
            return rows // self.factor, columns // self.factor
        return (1, rows * columns + vision.extra_tokens) if vision.extra_tokens else (rows, columns)

    def num_tokens(self, vision: Vision) -> int:
        """M: tokens that the projector emits for one image."""
        rows, columns = self.output_grid(vision)
        return rows * columns


FusionKind = Literal["unified", "cross_attention", "encoder_decoder"]


@dataclass(frozen=True)
class Fusion:
    kind: FusionKind = "unified"  # how image tokens reach the decoder
    cross_every: int = 1  # cross_attention: a cross block before decoder blocks 0, k, 2k, ...
    cross_layers: tuple[int, ...] = ()  # cross_attention: before these decoder blocks instead
    gated: bool = True  # cross_attention: tanh gates that start at 0

    @property
    def image_in_sequence(self) -> bool:
        return self.kind == "unified"

    @property
    def image_in_memory(self) -> bool:
        return self.kind != "unified"

    @property
    def has_gates(self) -> bool:
        return self.kind == "cross_attention" and self.gated

    def sublayers(self, depth: int) -> tuple[tuple[str, ...], ...]:
        """The decoder's blocks, each a tuple of sublayers in the order in which they run."""
        if self.kind == "unified":
            return (("self", "mlp"),) * depth
        if self.kind == "encoder_decoder":
            return (("self", "cross", "mlp"),) * depth
        chosen = self.cross_layers or range(0, depth, self.cross_every)
        crossing, plain = ("cross", "cross_mlp", "self", "mlp"), ("self", "mlp")
        return tuple(crossing if i in chosen else plain for i in range(depth))


@dataclass(frozen=True)
class Decoder(Transformer):
    vocab_size: int = 512  # V: rows of the embedding; the tokenizer has at most as many
    positions: Literal["rope", "learned"] = "rope"
    max_positions: int = 256  # the longest sequence
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0  # share of a head's numbers that RoPE turns
    tied_head: bool = True  # the output head is the embedding


@dataclass(frozen=True)
class RateScale:
    """Learning rate of a part as a multiple of `optim.learning_rate`; 0 freezes the part."""

    vision: float = 1.0
    projector: float = 1.0
    decoder: float = 1.0
    cross_attention: float = 1.0


@dataclass(frozen=True)
class Optim:
    kind: Literal["adamw", "muon"] = "adamw"  # muon: for kernels; all else is AdamW's as before
    learning_rate: float = 1e-3  # the peak, after warm-up
    rate_scale: RateScale = field(default_factory=RateScale)
    warmup_steps: int = 100
    final_fraction: float = 0.0  # the cosine ends at this share of the peak
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 1e-4  # of matrices only
    clip_norm: float = 1.0  # global norm of the gradient


@dataclass(frozen=True)
class Train:
    steps: int = 1500
    batch_size: int = 128  # rows in a global batch
    checkpoint_every_steps: int = 500
    keep_checkpoints: int = 3
    log_every_steps: int = 20


@dataclass(frozen=True)
class Mesh:
    data: int = -1  # devices along each axis; -1: what is left
    fsdp: int = 1
    tensor: int = 1

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """The axes with -1 filled in.

        Raises:
          ConfigError: they do not multiply to the number of devices.
        """
        axes = (self.data, self.fsdp, self.tensor)
        known = math.prod(size for size in axes if size != -1)
        free = axes.count(-1)
        if free <= 1 and known > 0 and devices % known == 0 and (free or known == devices):
            return tuple(devices // known if size == -1 else size for size in axes)
        raise ConfigError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {' x '.join(map(str, axes))} does not fit {devices} device(s): "
            f"the three must multiply to {devices}, and at most one may be -1 (what is left)."
        )


@dataclass(frozen=True)
class Eval:
    split: str = "test"
    max_examples: int = 0  # 0: all
    batch_size: int = 256  # questions at a time
    max_new_tokens: int = 8


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
    eval: Eval = field(default_factory=Eval)
    workdir: str = ""  # where the run is kept; empty: runs/<config name>
    seed: int = 0

    @property
    def image_tokens(self) -> int:
        """M: tokens of one image after the projector."""
        return self.projector.num_tokens(self.vision)

    @property
    def image_slots_in_row(self) -> int:
        """Slots that one image takes in the decoder's sequence, newlines included."""
        if not self.fusion.image_in_sequence:
            return 0
        newlines = self.projector.output_grid(self.vision)[0] if self.vision.newline_token else 0
        return self.image_tokens + newlines

    @property
    def row_length(self) -> int:
        """S: tokens of a training row."""
        return self.image_slots_in_row + self.data.text_length
