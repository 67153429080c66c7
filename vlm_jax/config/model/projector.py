"""Settings of the projector, and the table of projectors."""

from dataclasses import dataclass
from typing import Literal

from vlm_jax.config.model.rows import get_row
from vlm_jax.config.model.transformer import Activation, NormKind
from vlm_jax.config.model.vision import Vision


@dataclass(frozen=True)
class ProjectorSpec:
    """A projector in `PROJECTORS`: its class and the tokens that it emits."""

    module: str  # class in nn/projector.py, which this package may not import
    #: tokens that come out. all: one for each that goes in; squares: one for each factor x factor
    #: square of the grid; queries: `queries`, whatever goes in
    tokens: Literal["all", "squares", "queries"] = "all"
    fields: tuple[str, ...] = ()  # settings of `Projector` that the class uses
    #: squares, queries: the class also takes the packed patches of images at native resolution
    native: bool = False

    @property
    def takes_native(self) -> bool:
        """True if it projects images at native resolution: by the row, or each token alone."""
        return self.native or self.tokens == "all"


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
    "pixel_shuffle": ProjectorSpec("PixelShuffle", tokens="squares", fields=MERGING, native=True),
    "average_pool": ProjectorSpec("AveragePool", tokens="squares", fields=MERGING, native=True),
    "resampler": ProjectorSpec("Resampler", tokens="queries", fields=RESAMPLING, native=True),
    "qformer": ProjectorSpec(
        "QFormer", tokens="queries", fields=(*QUERYING, "width", "cross_every"), native=True
    ),
    "none": ProjectorSpec("Identity"),
}


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
    qk_norm: bool = True  # resampler, qformer: normalize query and key heads
    #: resampler: every block normalizes the image tokens anew, and its queries are normalized as
    #: keys, too (Idefics); otherwise the image tokens are normalized once
    block_norms: bool = False
    cross_every: int = 2  # qformer: k: cross-attention in blocks 0, k, 2k, ...
    #: resampler, qformer: activation of the blocks' MLPs
    block_activation: Activation = "gelu_tanh"

    @property
    def spec(self) -> ProjectorSpec:
        return get_row(PROJECTORS, "projector.kind", self.kind)

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
