"""What a model is: the settings of its parts. Every public family is a choice of them, never a class of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlm_jax.config.errors import ConfigError

CHANNELS = 3  # red, green, blue

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2"]


@dataclass(frozen=True)
class Transformer:
    """What the image encoder and the decoder have in common."""

    width: int = 128  # D: numbers of a token
    depth: int = 4  # blocks
    heads: int = 4  # N: attention heads
    kv_heads: int = 0  # K: key/value heads (grouped-query attention); 0: as many as heads
    head_dim: int = 0  # H: numbers of a head; 0: width / heads
    mlp_width: int = 512  # F: hidden numbers of the MLP
    #: centred: scales are kept minus 1 (Gemma)
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_zero_centered"] = "layernorm"
    norm_eps: float = 1e-6  # added to the variance
    #: x + f(norm x), norm(x + f(x)), or x + norm(f(norm x))
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    activation: Activation = "gelu_tanh"  # of the MLP
    gated_mlp: bool = False  # down(act(gate x) * up x) instead of down(act(up x))
    qkv_bias: bool = True  # biases of the query, key and value projections
    out_bias: bool = True  # bias of attention's output projection
    mlp_bias: bool = True  # biases of the MLP
    qk_norm: bool = False  # a norm of every query and key head, before RoPE
    query_scale: float = 0.0  # factor of attention's scores; 0: 1 / sqrt(H)
    score_softcap: float = 0.0  # c: attention's scores become c tanh(score / c); 0: they stay
    #: of what a sublayer adds: D numbers, or tanh of one
    layer_scale: Literal["none", "vector", "tanh_gate"] = "none"
    #: blocks (or periods of them) laid out per turn of the loop: slower to compile, remat saves
    #: less
    unroll: int = 1
    #: what the backward pass computes again: nothing, all but attention and products with weights, all but those
    #: products, or everything but the inputs of the blocks
    remat: Literal["none", "attention", "dots", "full"] = "none"

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.width // self.heads


@dataclass(frozen=True)
class Vision(Transformer):
    #: the encoder; none: patches go straight to the projector (Fuyu)
    kind: Literal["vit", "none"] = "vit"
    #: folder of a public checkpoint: its encoder's settings, and its weights to begin with
    checkpoint: str = ""
    image_size_px: int = 64  # height and width of an image
    #: of red, green and blue in 0..1: subtracted from a pixel
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    #: of red, green and blue: what a pixel is divided by then
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    #: how an image becomes a square: its sides are scaled apart; the shorter side is scaled and the middle cut out; or
    #: it is padded. With `tile_layouts`: pad fits it onto tiles
    resize: Literal["squash", "crop", "pad"] = "squash"
    #: crop: length of the shorter side before the middle is cut out; 0: image_size_px
    resize_px: int = 0
    #: filter of the resize
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"
    patch_size_px: int = 8  # height and width of a patch
    #: the same numbers, computed as a product or a convolution
    patch_embed: Literal["linear", "conv"] = "linear"
    patch_bias: bool = True  # bias of the patch embedding
    #: position embeddings that are added to the patches
    positions: Literal["learned", "sincos", "none"] = "learned"
    class_token: bool = False  # a learned token in front of the patches
    keep_class_token: bool = False  # hand it on to the projector
    #: the token that stood for hidden patches in pretraining (DINOv2); carried along
    mask_token: bool = False
    pre_norm: bool = False  # a norm before the first block (CLIP)
    #: what the norm after the last block is for
    final_norm: Literal["tokens", "pooled", "none"] = "tokens"
    #: hidden states that go on; 0: embeddings, -1: last; (): the output
    feature_layers: tuple[int, ...] = ()
    #: one vector an image; tanh: of a product
    pool: Literal["none", "class", "tanh", "attention"] = "none"
    #: rows of a classifier that reads the class token, carried along; 0: there is none
    classes: int = 0
    newline_token: bool = False  # unified: a text token after every row of image tokens (Fuyu)
    #: tiles of image_size_px that a large image is cut into, at the most; 1: it is squeezed to a
    #: square
    tiles: int = 1
    thumbnail: bool = True  # an image of several tiles has a picture of the whole of it besides
    #: tokens that name the tiles of an image in the text, <tile_1> and so on
    tile_tags: Literal["1d", "none"] = "1d"
    #: the encoder of Llama 3.2 Vision: rows and columns of tiles that it sees together; each layout has position
    #: embeddings of its own
    tile_layouts: tuple[tuple[int, int], ...] = ()
    #: gated blocks after the others; the features are then the output and `feature_layers`
    num_global_layers: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.image_size_px // self.patch_size_px,) * 2

    @property
    def cut_tiles(self) -> int:
        """Tiles that the data cuts an image into, at the most: each is an image of its own to the encoder."""
        return 1 if self.tile_layouts else self.tiles

    @property
    def views(self) -> int:
        """J: pictures that the data makes of one image, at the most: its tiles and then its thumbnail."""
        return self.cut_tiles + int(self.thumbnail and self.cut_tiles > 1)

    @property
    def pictures(self) -> int:
        """Pictures of one image that the encoder reads at the most, one by one or all together."""
        return self.tiles if self.tile_layouts else self.views

    @property
    def keeps_aspect_in_tiles(self) -> bool:
        """Whether an image is fitted onto the tiles of `tile_layouts`, and not squashed into one of them."""
        return bool(self.tile_layouts) and self.resize == "pad"

    @property
    def has_tags(self) -> bool:
        return self.tile_tags != "none" and self.views > 1

    @property
    def patch_dim(self) -> int:
        """C: numbers of one flattened patch."""
        return self.patch_size_px**2 * CHANNELS

    @property
    def output_width(self) -> int:
        """E: numbers of a token that reaches the projector."""
        if self.kind == "none":
            return self.patch_dim
        return self.width * (len(self.feature_layers) + bool(self.tile_layouts) or 1)

    @property
    def extra_tokens(self) -> int:
        """Tokens beside the grid that reach the projector."""
        return int(self.kind == "vit" and self.class_token and self.keep_class_token)


@dataclass(frozen=True)
class ProjectorSpec:
    """A projector in `PROJECTORS`: its class and the tokens that it emits."""

    module: str  # class in nn/projector.py, which this package may not import
    #: tokens that come out. all: one for each that goes in; squares: one for each factor x factor
    #: square of the grid; queries: `queries`, whatever goes in
    tokens: Literal["all", "squares", "queries"] = "all"
    fields: tuple[str, ...] = ()  # settings of `Projector` that the class uses


PROJECTORS = {
    "linear": ProjectorSpec("Linear", fields=("bias",)),
    "mlp": ProjectorSpec("Mlp", fields=("bias", "activation")),
    "pixel_shuffle": ProjectorSpec("PixelShuffle", tokens="squares", fields=("factor",)),
    "average_pool": ProjectorSpec("AveragePool", tokens="squares", fields=("factor",)),
    "resampler": ProjectorSpec("Resampler", tokens="queries", fields=("queries", "depth", "heads")),
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


@dataclass(frozen=True)
class Projector:
    # The type is a string so that it is evaluated, and the table read, whenever it is asked for.
    #: maps image tokens of the encoder to the decoder's width
    kind: "Literal[tuple(PROJECTORS)]" = "linear"
    #: folder of a public checkpoint: its projector's settings, and its weights to begin with
    checkpoint: str = ""
    activation: Activation = "gelu"  # mlp: activation between its two layers
    bias: bool = True  # linear, mlp: use biases
    factor: int = 2  # pixel_shuffle, average_pool: factor x factor tokens become one
    queries: int = 16  # resampler: number of output tokens
    depth: int = 2  # resampler: number of blocks
    heads: int = 4  # resampler: number of attention heads

    @property
    def spec(self) -> ProjectorSpec:
        return _row(PROJECTORS, "projector.kind", self.kind)

    def output_grid(self, vision: Vision) -> tuple[int, int]:
        """Rows and columns of the tokens that the projector emits for one image.

        Tokens that are not on a grid, such as learned queries, are one row.
        """
        rows, columns = vision.grid
        if self.spec.tokens == "queries":
            return 1, self.queries
        if self.spec.tokens == "squares":
            return rows // self.factor, columns // self.factor
        return (1, rows * columns + vision.extra_tokens) if vision.extra_tokens else (rows, columns)

    def num_tokens(self, vision: Vision) -> int:
        """M: tokens that the projector emits for one image, or for one of its tiles or its thumbnail."""
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
    #: bidirectional: prefix-LM attention over image and prompt (PaliGemma)
    prefix: Literal["causal", "bidirectional"] = "causal"
    #: cross_attention, hybrid: k: a cross-attention block before decoder blocks 0, k, 2k, ...
    cross_every: int = 1
    #: cross_attention, hybrid: cross-attention blocks before these decoder blocks instead;
    #: decoder.depth: after the last
    cross_layers: tuple[int, ...] = ()
    #: cross_attention, hybrid: tanh gates that start at 0 and so keep a trained decoder at first
    gated: bool = False
    #: cross_attention, encoder_decoder, hybrid: normalise query and key heads in cross-attention
    qk_norm: bool = True
    #: cross_attention, encoder_decoder: a placeholder token in the text for each image (Llama 3.2
    #: Vision, Flamingo)
    placeholder: bool = False
    #: tokens before any image: masked out of cross-attention, or attend to all images (Llama 3.2
    #: Vision)
    tokens_without_image: Literal["mask_out", "attend_all"] = "mask_out"

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
        placement = () if self.has_cross_blocks else ("cross_every", "cross_layers", "gated")
        return placement if self.image_in_memory else (*placement, "qk_norm")

    def sublayers(self, depth: int) -> tuple[tuple[str, ...], ...]:
        """Returns the decoder's blocks, each a tuple of sublayers (`nn.blocks.SUBLAYERS`) in order."""
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
    """Rotary position embedding (Su et al. 2021) and the ways in which it is stretched to longer texts."""

    theta: float = 10_000.0  # the base of the wavelengths
    #: of the sliding blocks, never stretched; 0: theta, stretched like the others
    local_theta: float = 0.0
    fraction: float = 1.0  # share of a head's numbers that are turned
    #: how it is stretched to longer texts
    scaling: Literal["none", "linear", "llama3", "longrope"] = "none"
    #: linear, llama3: long wavelengths are this much longer; longrope: longest text / original
    factor: float = 1.0
    #: llama3: wavelengths above original_positions / this are stretched
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0  # llama3: those below original_positions / this stay
    original_positions: int = 8192  # llama3, longrope: the longest text before the stretch
    #: longrope: one a frequency, for texts up to original_positions
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()  # longrope: for longer ones


@dataclass(frozen=True)
class Decoder(Transformer):
    #: folder of a public checkpoint: its decoder's settings and tokenizer, and its weights to begin with
    checkpoint: str = ""
    vocab_size: int = 512  # V: rows of the output head; the tokenizer has at most as many
    #: tokens that can be read but never written: rows of the embedding beyond the head's (mllama)
    extra_tokens: int = 0
    embed_scale: bool = False  # embeddings times sqrt(D)
    embed_norm: bool = False  # a norm after embeddings and positions are added
    #: rotary, or position embeddings that are added
    positions: Literal["rope", "learned", "sincos"] = "rope"
    max_positions: int = 256  # the longest sequence
    position_offset: int = 0  # learned, sincos: the row of position 0
    rope: Rope = field(default_factory=Rope)
    sliding_window: int = 0  # tokens, itself included, that a token of a sliding block sees
    sliding_layers: tuple[int, ...] = ()  # the blocks that slide
    final_norm: bool = True  # a norm after the last block
    tie_word_embeddings: bool = True  # the output head is the embedding
    logit_softcap: float = 0.0  # c: logits become c tanh(logit / c); 0: they stay

    @property
    def rotary_dim(self) -> int:
        """R: numbers of a head that RoPE turns."""
        return int(self.head_width * self.rope.fraction)


@dataclass(frozen=True)
class Model:
    """Settings of a vision-language model: all that `nn/` sees of an experiment."""

    vision: Vision = field(default_factory=Vision)
    projector: Projector = field(default_factory=Projector)
    fusion: Fusion = field(default_factory=Fusion)
    decoder: Decoder = field(default_factory=Decoder)

    @property
    def image_tokens(self) -> int:
        """M: tokens of one image, or of one view of it, after the projector."""
        return self.projector.num_tokens(self.vision)


@dataclass(frozen=True)
class Contrastive:
    """Two towers that meet in a dot product alone (CLIP, SigLIP); `text` is a decoder without a head."""

    vision: Vision
    text: Decoder
    embed_width: int = 512  # W: numbers of the vectors that are compared
    #: a product from the pooled image to embed_width; otherwise it is as wide already
    image_projection: bool = True
    text_projection_bias: bool = False  # of the product from the text's token to embed_width
    causal: bool = True  # whether a text token sees only what stands before it
    #: the token that stands for the text; last: of the row, be it padding
    text_pool: Literal["largest_id", "first_eos", "last"] = "largest_id"
    eos_id: int = 2  # of first_eos
    logit_bias: bool = False  # a number added to every logit (SigLIP)
