"""Settings of the model's parts; every public model family is a choice of them, not a class."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlm_jax.config.errors import ConfigError

CHANNELS = 3  # red, green, blue

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2"]
NormKind = Literal["layernorm", "rmsnorm", "rmsnorm_zero_centered"]


# Sections of a model that may start from a checkpoint of their own.
PRETRAINED_PARTS = ("vision", "projector", "decoder")


@dataclass(frozen=True)
class Transformer:
    """Settings that the image encoder and the decoder share."""

    width: int = 128  # D: model dimension
    depth: int = 4  # number of blocks
    heads: int = 4  # N: number of attention heads
    #: K: number of key/value heads (grouped-query attention); None: heads
    kv_heads: int | None = None
    head_dim: int | None = None  # H: head dimension; None: width / heads
    mlp_width: int = 512  # F: hidden dimension of the MLP
    #: rmsnorm_zero_centered: stores scale - 1 (Gemma)
    norm: NormKind = "layernorm"
    norm_eps: float = 1e-6  # added to the variance
    #: x + f(norm(x)), norm(x + f(x)), x + norm(f(norm(x))), or x + norm(f(x))
    norm_position: Literal["pre", "post", "sandwich", "output"] = "pre"
    activation: Activation = "gelu_tanh"  # activation of the MLP
    gated_mlp: bool = False  # down(act(gate x) * up x) instead of down(act(up x))
    qkv_bias: bool = True  # biases of the query, key and value projections
    key_bias: bool = True  # False: the key projection has no bias, even with qkv_bias
    out_bias: bool = True  # bias of attention's output projection
    mlp_bias: bool = True  # biases of the MLP
    #: normalise queries and keys before RoPE: each head, or all heads of a token together
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    query_scale: float | None = None  # factor of the attention scores; None: 1 / sqrt(H)
    #: c: attention scores become c tanh(score / c); None: not capped
    score_softcap: float | None = None
    #: per-channel LayerScale, or a scalar tanh gate, on each residual branch
    layer_scale: Literal["none", "vector", "tanh_gate"] = "none"
    #: unroll of the scan over layers: faster steps, slower compilation, less saved by remat
    unroll: int = 1
    #: rematerialise nothing; all but attention and matmuls with weights; all but those matmuls;
    #: everything
    remat: Literal["none", "attention", "dots", "full"] = "none"

    def has_bias(self, kernel: str) -> bool:
        """Returns whether a kernel of a block, such as "key" or "up", has a bias."""
        if kernel in ("query", "key", "value"):
            return self.qkv_bias and (self.key_bias or kernel != "key")
        return self.out_bias if kernel == "out" else self.mlp_bias

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        return self.width // self.heads if self.head_dim is None else self.head_dim


@dataclass(frozen=True)
class PatchRope:
    """2-D rotary position embedding of patches (Heo et al. 2024, RoPE-ViT, section 3.2, axial).

    Half of the frequencies rotate with the row of a patch, the other half with its column.
    """

    #: frequencies, of H / 2 for a head of dimension H. same: theta^(-4 i / H) for rows and for
    #: columns (Qwen2-VL, DINOv3); alternate: of theta^(-2 i / H), even i for rows and odd i for
    #: columns (Pixtral)
    kind: Literal["none", "same", "alternate"] = "none"
    theta: float = 10_000.0  # base of the wavelengths
    #: what a frequency is multiplied by. index: row or column, from 0; centered: -2 pi to 2 pi from
    #: one border of the image to the other, whatever its size (DINOv3)
    coordinates: Literal["index", "centered"] = "index"


@dataclass(frozen=True)
class Vision(Transformer):
    #: the encoder; none: patches go straight to the projector (Fuyu)
    kind: Literal["vit", "none"] = "vit"
    #: checkpoint folder: its encoder's settings and initial weights
    checkpoint: str = ""
    image_size_px: int = 64  # height and width of an image
    #: native resolution: an image keeps its shape, in at most this many patches, and the patches of
    #: all images of a row are one sequence; None: every image has image_size_px
    max_patches: int | None = None
    #: native resolution: rows and columns of patches are multiples of it, and the patches of a
    #: square of this side follow one another; projector.factor of a projector that merges squares
    patch_square: int = 1
    #: mean of red, green and blue in 0..1, subtracted from the pixels
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    #: standard deviation of red, green and blue, the divisor of the pixels
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    #: how an image becomes square: scale both sides; scale the shorter side and crop the centre; or
    #: scale the longer side and pad. With tile_layouts or tile_grids, pad fits the image onto tiles
    resize: Literal["squash", "crop", "pad"] = "squash"
    #: crop: length of the shorter side before the crop; None: image_size_px
    resize_px: int | None = None
    #: filter of the resize
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"
    #: how images of other modes become RGB. composite: transparent pixels become white, 16 bits are
    #: scaled to 8; convert: Pillow drops transparency and clips 16 bits at 255; convert_composite:
    #: the same, but a colour that the file declares transparent becomes white
    rgb_conversion: Literal["composite", "convert", "convert_composite"] = "composite"
    patch_size_px: int = 8  # height and width of a patch
    #: patch embedding as a matmul or as the equal strided convolution
    patch_embed: Literal["linear", "conv"] = "linear"
    patch_bias: bool = True  # bias of the patch embedding
    #: video frames that a patch covers; an image is repeated as often (Qwen2-VL)
    patch_frames: int = 1
    #: position embeddings that are added to the patches
    positions: Literal["learned", "sincos", "none"] = "learned"
    #: interpolation of learned positions to another grid. bicubic: PyTorch's, without antialiasing;
    #: bilinear: with antialiasing (SigLIP 2 NaFlex); corners: bilinear, with the corners of both
    #: grids on each other (Qwen3-VL)
    resample_positions: Literal["bicubic", "bilinear", "corners"] = "bicubic"
    #: positions of patches in the blocks' self-attention, with or without embeddings that are added
    rope: PatchRope = PatchRope()
    #: side in patches of the squares within which the patches of windowed_layers attend
    window_patches: int | None = None
    windowed_layers: tuple[int, ...] = ()  # blocks with attention in windows (Qwen2.5-VL)
    class_token: bool = False  # prepend a learned token to the patches
    #: learned tokens after the class token, which the projector does not get (Darcet et al. 2024)
    registers: int = 0
    keep_class_token: bool = False  # pass the class token to the projector
    #: mask token of DINO's pretraining; unused, kept for export
    mask_token: bool = False
    pre_norm: bool = False  # normalise before the first block (CLIP)
    #: norm after the last block: of all tokens, of the pooled vector, or none
    final_norm: Literal["tokens", "pooled", "none"] = "tokens"
    #: hidden states for the projector; 0: embeddings, -1: last block; (): the encoder's output
    feature_layers: tuple[int, ...] = ()
    #: pixel_shuffle: hidden states (from 1, as feature_layers) that are projected apart. After each
    #: of the first decoder blocks one is added to the image tokens in the sequence, and each of
    #: the first blocks of cross-attention reads one instead of the output (DeepStack; Qwen3-VL)
    deepstack_layers: tuple[int, ...] = ()
    #: pooled image vector: class token, tanh(linear(class token)), or attention pooling
    pool: Literal["none", "class", "tanh", "attention"] = "none"
    #: classes of a classifier on the class token, kept for export; None: no classifier
    classes: int | None = None
    newline_token: bool = False  # unified: a text token after every row of image tokens (Fuyu)
    #: maximum number of tiles per image, each of image_size_px; 1: resize to one square
    tiles: int = 1
    #: append a thumbnail of the whole image if it has more than one tile
    thumbnail: bool = True
    #: text tokens that name the tiles of an image: <tile_1> and so on
    tile_tags: Literal["1d", "none"] = "1d"
    #: rows and columns of tiles that the encoder of Llama 3.2 Vision encodes together; each layout
    #: has its own position embeddings
    tile_layouts: tuple[tuple[int, int], ...] = ()
    #: gated blocks after the other blocks; features are then the output and feature_layers
    num_global_layers: int = 0
    #: rows and columns of tiles that an image may have. Its tokens are then the thumbnail and one
    #: map of the tiles without padding, in which a learned vector ends each row (LLaVA-NeXT)
    tile_grids: tuple[tuple[int, int], ...] = ()
    #: tile_grids: larger maps are resized to about the tokens of this number of tiles
    #: (LLaVA-OneVision)
    max_map_tiles: int | None = None

    @property
    def has_encoder(self) -> bool:
        """True if an encoder is between the patches and the projector."""
        return self.kind != "none"

    @property
    def is_native(self) -> bool:
        """True if images keep their shape, and their patches are packed."""
        return self.max_patches is not None

    @property
    def square_px(self) -> int:
        """Side of a square of patches at native resolution."""
        return self.patch_size_px * self.patch_square

    @property
    def max_squares(self) -> int:
        """Maximum number of squares of patches of an image at native resolution."""
        return (self.max_patches or 0) // self.patch_square**2

    @property
    def shortest_edge_px(self) -> int:
        """Length of the shorter side of an image before the crop."""
        return self.image_size_px if self.resize_px is None else self.resize_px

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.image_size_px // self.patch_size_px,) * 2

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the patches in the encoder's blocks."""
        return int(self.class_token) + self.registers if self.has_encoder else 0

    @property
    def cut_tiles(self) -> int:
        """Maximum number of tiles per image that the encoder encodes separately."""
        return 1 if self.tile_layouts else self.tiles

    @property
    def views(self) -> int:
        """J: maximum number of views per image in the data: its tiles, then its thumbnail."""
        return self.cut_tiles + int(self.thumbnail and self.cut_tiles >= self.least_tiles)

    @property
    def least_tiles(self) -> int:
        """Number of tiles from which on an image has a thumbnail."""
        return 1 if self.tile_grids else 2

    @property
    def pictures(self) -> int:
        """Maximum number of encoder inputs per image, encoded separately or together."""
        return self.tiles if self.tile_layouts else self.views

    @property
    def keeps_aspect_in_tiles(self) -> bool:
        """True if an image is fitted onto the tiles of `tile_layouts`, not squashed into one."""
        return bool(self.tile_layouts) and self.resize == "pad"

    @property
    def has_tags(self) -> bool:
        return self.tile_tags != "none" and self.views > 1

    @property
    def patch_dim(self) -> int:
        """C: size of a flattened patch of one frame."""
        return self.patch_size_px**2 * CHANNELS

    @property
    def output_width(self) -> int:
        """E: dimension of the projector's input tokens."""
        if not self.has_encoder:
            return self.patch_dim
        return self.width * (len(self.feature_layers) + bool(self.tile_layouts) or 1)

    @property
    def extra_tokens(self) -> int:
        """Number of tokens besides the grid in the projector's input."""
        return int(self.has_encoder and self.class_token and self.keep_class_token)


@dataclass(frozen=True)
class ProjectorSpec:
    """A projector in `PROJECTORS`: its class and the tokens that it emits."""

    module: str  # class in nn/projector.py, which this package may not import
    #: tokens that come out. all: one for each that goes in; squares: one for each factor x factor
    #: square of the grid; queries: `queries`, whatever goes in
    tokens: Literal["all", "squares", "queries"] = "all"
    fields: tuple[str, ...] = ()  # settings of `Projector` that the class uses


# Settings of projectors that merge squares of tokens.
MERGING = (
    *("factor", "norm", "norm_eps", "merge_linear"),
    *("projection", "mlp_width", "activation", "bias"),
)
# Settings of projectors with learned queries.
QUERYING = (
    *("queries", "depth", "heads", "head_dim", "qk_norm", "norm_eps"),
    *("block_mlp_width", "block_activation", "bias"),
)
RESAMPLING = (*QUERYING, "block_norms", "projection", "mlp_width", "activation")
PROJECTORS = {
    "linear": ProjectorSpec("Linear", fields=("bias",)),
    "mlp": ProjectorSpec("Mlp", fields=("bias", "activation", "mlp_width")),
    "pixel_shuffle": ProjectorSpec("PixelShuffle", tokens="squares", fields=MERGING),
    "average_pool": ProjectorSpec("AveragePool", tokens="squares", fields=MERGING),
    "resampler": ProjectorSpec("Resampler", tokens="queries", fields=RESAMPLING),
    "qformer": ProjectorSpec(
        "QFormer", tokens="queries", fields=(*QUERYING, "width", "cross_every")
    ),
    "none": ProjectorSpec("Identity"),
}


def _row(table: Mapping[str, Any], name: str, kind: str):
    """Returns the row of a table that field `name` chooses.

    Raises:
      ConfigError: the table has no such row.
    """
    if kind not in table:
        raise ConfigError(f"{name} {kind!r} is not a valid choice: choose {', '.join(table)}.")
    return table[kind]


# Types of `kind` are strings here and in Fusion: they are evaluated, and the tables read, whenever
# hints are asked for, so that rows that are added later are choices as well.
@dataclass(frozen=True)
class Projector:
    #: maps image tokens of the encoder to the decoder's width
    kind: "Literal[tuple(PROJECTORS)]" = "linear"
    #: checkpoint folder: its projector's settings and initial weights
    checkpoint: str = ""
    activation: Activation = "gelu"  # mlp, projection mlp: activation between its two layers
    #: mlp, projection mlp: width between its two layers; None: decoder.width
    mlp_width: int | None = None
    bias: bool = True  # use biases
    factor: int = 2  # pixel_shuffle, average_pool: factor x factor tokens become one
    #: pixel_shuffle, average_pool: norm of the merged tokens, before their projection
    norm: Literal["none", NormKind] = "none"
    #: pixel_shuffle, average_pool, resampler, qformer: added to the variance
    norm_eps: float = 1e-6
    #: pixel_shuffle, average_pool: a linear layer without bias from the merged tokens to the
    #: encoder's width, before their projection (Mistral 3)
    merge_linear: bool = False
    #: layers, as the kinds of this name, that project merged tokens (pixel_shuffle, average_pool)
    #: or the input of the blocks (resampler). none: resampler, blocks of the encoder's width
    projection: Literal["linear", "mlp", "none"] = "linear"
    queries: int = 16  # resampler, qformer: number of output tokens
    depth: int = 2  # resampler, qformer: number of blocks
    width: int | None = None  # qformer: width of the blocks; None: decoder.width
    heads: int = 4  # resampler, qformer: number of attention heads
    #: resampler, qformer: head dimension; None: width of the blocks / heads
    head_dim: int | None = None
    #: resampler, qformer: hidden dimension of the blocks' MLPs; None: 4 * width of the blocks
    block_mlp_width: int | None = None
    qk_norm: bool = True  # resampler, qformer: normalise query and key heads
    #: resampler: every block normalises the image tokens anew, and its queries are normalised as
    #: keys, too (Idefics); otherwise the image tokens are normalised once
    block_norms: bool = False
    cross_every: int = 2  # qformer: k: cross-attention in blocks 0, k, 2k, ...
    #: resampler, qformer: activation of the blocks' MLPs
    block_activation: Activation = "gelu_tanh"

    @property
    def spec(self) -> ProjectorSpec:
        return _row(PROJECTORS, "projector.kind", self.kind)

    @property
    def merged_side(self) -> int:
        """Side of the squares of patches of which one token comes out."""
        return self.factor if self.spec.tokens == "squares" else 1

    @property
    def keeps_width(self) -> bool:
        """True if the tokens that it emits have the encoder's width."""
        is_unprojected = "projection" in self.spec.fields and self.projection == "none"
        return self.kind == "none" or is_unprojected

    def block_width(self, vision: Vision, decoder_width: int) -> int:
        """Width of the blocks of a projector with learned queries."""
        if "width" in self.spec.fields and self.width is not None:
            return self.width
        return vision.output_width if self.keeps_width else decoder_width

    def output_grid(self, vision: Vision) -> tuple[int, int]:
        """Rows and columns of the tokens that the projector emits for one image.

        Tokens that are not on a grid, such as learned queries, are one row. At native resolution it
        is one row of the maximum number of tokens.
        """
        if self.spec.tokens == "queries":
            return 1, self.queries
        if vision.is_native:
            return 1, vision.max_squares
        rows, columns = vision.grid
        if self.spec.tokens == "squares":
            return rows // self.factor, columns // self.factor
        return (1, rows * columns + vision.extra_tokens) if vision.extra_tokens else (rows, columns)

    def num_tokens(self, vision: Vision) -> int:
        """M: (maximum) number of tokens that the projector emits for one view of an image."""
        rows, columns = self.output_grid(vision)
        return rows * columns


@dataclass(frozen=True)
class FusionStyle:
    """A fusion style in `FUSION_STYLES`: how image tokens reach the decoder.

    Where both fields apply, an image in tiles has its thumbnail in the sequence and its tiles in
    cross-attention (NVLM-H; Dai et al. 2024, section 4).
    """

    in_sequence: bool  # image tokens are concatenated with the text tokens
    #: image tokens are keys and values of cross-attention, in blocks between the decoder's blocks
    #: (interleaved) or in each of them (every_block)
    cross_attention: Literal["none", "interleaved", "every_block"] = "none"


FUSION_STYLES = {
    "unified": FusionStyle(in_sequence=True),
    "cross_attention": FusionStyle(in_sequence=False, cross_attention="interleaved"),
    "encoder_decoder": FusionStyle(in_sequence=False, cross_attention="every_block"),
    "hybrid": FusionStyle(in_sequence=True, cross_attention="interleaved"),
    "text_only": FusionStyle(in_sequence=False),
}


@dataclass(frozen=True)
class Fusion:
    kind: "Literal[tuple(FUSION_STYLES)]" = "unified"  # how image tokens reach the decoder
    #: tokens that attend to each other in both directions: none; image and prompt, as the prefix of
    #: a prefix-LM (PaliGemma); or the tokens of an image, as far as sliding windows reach (Gemma 3)
    prefix: Literal["causal", "bidirectional", "bidirectional_images"] = "causal"
    #: cross_attention, hybrid: k: a cross-attention block before decoder blocks 0, k, 2k, ...
    cross_every: int = 1
    #: cross_attention, hybrid: cross-attention blocks before these decoder blocks instead;
    #: decoder.depth: after the last
    cross_layers: tuple[int, ...] = ()
    #: cross_attention, hybrid: tanh gates that start at 0 and so keep a trained decoder at first
    gated: bool = False
    #: gated: a gate for each sublayer, or for each of its channels (Idefics)
    gate: Literal["scalar", "vector"] = "scalar"
    #: cross_attention, encoder_decoder, hybrid: normalise query and key heads in cross-attention
    qk_norm: bool = True
    #: cross_attention, encoder_decoder: a placeholder token in the text for each image (Llama 3.2
    #: Vision, Flamingo)
    placeholder: bool = False
    #: tokens before any image: masked out of cross-attention, masked out of its attention but not
    #: of its MLP (Idefics), or attend to all images (Llama 3.2 Vision)
    tokens_without_image: Literal["mask_out", "mask_attention", "attend_all"] = "mask_out"

    @property
    def style(self) -> FusionStyle:
        return _row(FUSION_STYLES, "fusion.kind", self.kind)

    @property
    def image_in_sequence(self) -> bool:
        return self.style.in_sequence

    @property
    def image_in_memory(self) -> bool:
        """True if image tokens are keys and values of cross-attention."""
        return self.style.cross_attention != "none"

    @property
    def has_images(self) -> bool:
        return self.image_in_sequence or self.image_in_memory

    @property
    def is_prefix_lm(self) -> bool:
        """True if image and prompt are a prefix with bidirectional attention."""
        return self.prefix == "bidirectional"

    @property
    def has_image_blocks(self) -> bool:
        """True if the tokens of each image attend to each other in both directions."""
        return self.prefix == "bidirectional_images"

    @property
    def has_blocks(self) -> bool:
        """True if some tokens attend to each other in both directions."""
        return self.is_prefix_lm or self.has_image_blocks

    @property
    def splits_views(self) -> bool:
        """True if the thumbnail is in the sequence and the tiles are in cross-attention."""
        return self.image_in_sequence and self.image_in_memory

    @property
    def has_cross_blocks(self) -> bool:
        """True if blocks of cross-attention are interleaved with the decoder's blocks."""
        return self.style.cross_attention == "interleaved"

    @property
    def is_encoder_decoder(self) -> bool:
        """True if every decoder block has cross-attention (Vaswani et al. 2017)."""
        return self.style.cross_attention == "every_block"

    @property
    def has_gates(self) -> bool:
        return self.has_cross_blocks and self.gated

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the fields that have no effect with this kind."""
        placement = ("cross_every", "cross_layers", "gated", "gate")
        placement = () if self.has_cross_blocks else placement
        return placement if self.image_in_memory else (*placement, "qk_norm")

    def sublayers(self, depth: int) -> tuple[tuple[str, ...], ...]:
        """Returns the decoder's blocks, each a tuple of names in `nn.blocks.SUBLAYERS`."""
        plain, crossing = ("self", "mlp"), ("cross", "cross_mlp")
        if self.is_encoder_decoder:
            return (("self", "cross", "mlp"),) * depth
        if not self.has_cross_blocks:
            return (plain,) * depth
        layers = self.cross_layers or tuple(range(0, depth, self.cross_every))
        blocks = []
        for i in range(depth):
            # A layer that is listed several times has as many cross blocks; the last one joins it.
            count = layers.count(i)
            blocks += [crossing] * (count - 1) + [crossing + plain if count else plain]
        return (*blocks, *[crossing] * layers.count(depth))


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) and its scaling to longer contexts."""

    theta: float = 10_000.0  # base of the wavelengths
    #: base in sliding blocks, which are never scaled; None: theta, scaled like the others
    local_theta: float | None = None
    fraction: float = 1.0  # fraction of the head dimension that is rotated
    #: numbers of frequencies that rotate with the time, the row and the column of an image token
    #: (M-RoPE; Wang et al. 2024, Qwen2-VL, section 2.1); empty: all with the token's position
    sections: tuple[int, ...] = ()
    #: sections: the frequencies of time, row and column take turns (Qwen3-VL)
    interleaved: bool = False
    #: scaling to longer contexts. dynamic: none up to max_positions; longer texts are refused
    scaling: Literal["none", "linear", "dynamic", "llama3", "longrope"] = "none"
    #: linear, llama3: factor by which long wavelengths grow; longrope: extended / original context;
    #: dynamic: kept for export
    factor: float = 1.0
    #: llama3: wavelengths above original_positions / low_freq_factor are scaled
    low_freq_factor: float = 1.0
    #: llama3: wavelengths below original_positions / high_freq_factor are kept
    high_freq_factor: float = 4.0
    original_positions: int = 8192  # llama3, longrope: context length before scaling
    #: longrope: a factor per frequency, for texts up to original_positions
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()  # longrope: a factor per frequency, for longer texts


@dataclass(frozen=True)
class Decoder(Transformer):
    #: checkpoint folder: its decoder's settings, tokenizer and initial weights
    checkpoint: str = ""
    vocab_size: int = 512  # V: size of the output head; not less than the tokenizer's
    #: input-only ids: additional rows of the embedding (mllama)
    extra_tokens: int = 0
    #: ids after vocab_size with an embedding table and an output head of their own (Idefics)
    added_tokens: int = 0
    embed_scale: bool = False  # multiply embeddings by sqrt(D)
    embed_norm: bool = False  # normalise the sum of embeddings and positions
    #: rotary, or position embeddings that are added
    positions: Literal["rope", "learned", "sincos"] = "rope"
    max_positions: int = 256  # maximum sequence length
    position_offset: int = 0  # learned, sincos: row of position 0
    rope: Rope = field(default_factory=Rope)
    #: number of tokens, itself included, that a token of a sliding block attends to
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()  # blocks with a sliding window
    #: blocks whose queries and keys are not rotated (NoPE, Kazemnejad et al. 2023)
    no_rope_layers: tuple[int, ...] = ()
    final_norm: bool = True  # normalise after the last block
    tie_word_embeddings: bool = True  # use the embedding as the output head
    logit_softcap: float | None = None  # c: logits become c tanh(logit / c); None: not capped

    @property
    def num_ids(self) -> int:
        """Number of ids that have an embedding."""
        return self.num_logits + self.extra_tokens

    @property
    def num_logits(self) -> int:
        """Number of ids that the output head has logits of."""
        return self.vocab_size + self.added_tokens

    @property
    def limits_positions(self) -> bool:
        """True if a token cannot have a position beyond `max_positions`."""
        return self.positions == "learned" or self.rope.scaling == "dynamic"

    @property
    def rotary_dim(self) -> int:
        """R: number of head dimensions that are rotated."""
        return int(self.head_width * self.rope.fraction)


@dataclass(frozen=True)
class LoraTarget:
    """An element of `Lora.targets`: kernels, and the rank and alpha of their adapters."""

    name: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class Lora:
    """LoRA (Hu et al. 2021): kernels get trained adapters; the rest of their part is frozen."""

    rank: int | None = None  # rank of an adapter; None: no adapters
    alpha: float = 16.0  # factor of an adapter's output, divided by the rank
    dropout: float = 0.0  # share of an adapter's inputs that training sets to 0
    #: kernels with an adapter: PART (decoder, cross_attention, vision or projector),
    #: PART.attention, PART.mlp or PART.KERNEL such as decoder.query; NAME:RANK or NAME:RANK:ALPHA
    #: gives these a rank and alpha of their own
    targets: tuple[str, ...] = ("decoder",)
    #: divide alpha by the square root of the rank instead (Kalajdzievski 2023)
    rslora: bool = False

    @property
    def parsed_targets(self) -> tuple[LoraTarget, ...]:
        """The targets, each with its rank and alpha; empty without a rank.

        Raises:
          ConfigError: a target is not NAME, NAME:RANK or NAME:RANK:ALPHA.
        """
        if self.rank is None:
            return ()
        return tuple(map(self._parse, self.targets))

    def _parse(self, target: str) -> LoraTarget:
        name, *numbers = target.split(":")
        try:
            rank = int(numbers[0]) if numbers else self.rank
            alpha = float(numbers[1]) if len(numbers) > 1 else self.alpha
        except ValueError:
            rank = alpha = 0
        if len(numbers) > 2 or rank < 1 or not 0 < alpha < math.inf:
            raise ConfigError(
                f"lora.targets {target!r} is not NAME, NAME:RANK or NAME:RANK:ALPHA, such as "
                "decoder.mlp:8:16."
            )
        return LoraTarget(name, rank, alpha)

    def scale(self, rank: int, alpha: float) -> float:
        """Returns the factor of an adapter's output."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Model:
    """Settings of a vision-language model: the part of an experiment that `nn/` takes."""

    vision: Vision = field(default_factory=Vision)
    projector: Projector = field(default_factory=Projector)
    fusion: Fusion = field(default_factory=Fusion)
    decoder: Decoder = field(default_factory=Decoder)
    lora: Lora = Lora()

    @property
    def image_tokens(self) -> int:
        """M: number of tokens of one view of an image after the projector."""
        return self.projector.num_tokens(self.vision)

    @property
    def has_tokens_by_size(self) -> bool:
        """True if an image has a token for each of its squares of patches, M at most."""
        return self.vision.is_native and self.projector.spec.tokens != "queries"


@dataclass(frozen=True)
class Contrastive:
    """Settings of an image and a text encoder that are compared by a dot product (CLIP, SigLIP).

    `text` is a decoder without an output head.
    """

    vision: Vision
    text: Decoder
    embed_width: int = 512  # W: dimension of the embeddings that are compared
    #: project the pooled image to embed_width; otherwise it has that width already
    image_projection: bool = True
    text_projection_bias: bool = False  # bias of the projection of texts to embed_width
    causal: bool = True  # causal attention in the text encoder
    #: token whose hidden state represents the text; last: may be padding (SigLIP)
    text_pool: Literal["largest_id", "first_eos", "last"] = "largest_id"
    eos_id: int = 2  # first_eos: id of the end of text
    logit_bias: bool = False  # add a learned bias to the logits (SigLIP)
