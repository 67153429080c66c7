"""Settings of images, their patches and tiles, and the image encoder."""

from dataclasses import dataclass
from typing import Literal

from vlm_jax.config.model.transformer import Transformer

CHANNELS = 3  # red, green, blue


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
    #: how an image becomes square: scale both sides; scale the shorter side and crop the center; or
    #: scale the longer side and pad. With tile_layouts or tile_grids, pad fits the image onto tiles
    resize: Literal["squash", "crop", "pad"] = "squash"
    #: crop: length of the shorter side before the crop; None: image_size_px
    resize_px: int | None = None
    #: filter of the resize
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"
    #: how images of other modes become RGB. composite: transparent pixels become white, 16 bits are
    #: scaled to 8; convert: Pillow drops transparency and clips 16 bits at 255; convert_composite:
    #: the same, but a color that the file declares transparent becomes white
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
    pre_norm: bool = False  # normalize before the first block (CLIP)
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
    #: unified: a text token after every row of image tokens (Fuyu). At native resolution only
    #: between two rows (Pixtral), where it takes the place of a token of text in a training row
    newline_token: bool = False
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
    def most_patches(self) -> int:
        """Number of patches of `max_squares`."""
        return self.max_squares * self.patch_square**2

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
