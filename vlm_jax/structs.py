"""Data structures passed between modules; shapes use the letters of axes.py."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

PADDING = 0  # segment id of a slot without a token
TRUNK = 0  # branch id of a token that every later token of its segment attends to
NO_IMAGE = -1  # `image_token_index` of a text token
# Fields of a batch with a row for each row of `images`.
IMAGE_ARRAYS = ("images", "tile_layouts", "tile_mask", "patch_images", "patch_places", "map_memory")
# Fields of a batch that only the encoder needs.
IMAGE_FIELDS = ("images", "image_rows", "tile_layouts", "tile_mask", "patch_places")
# Fields of a batch with which cross-attention finds the image tokens of an image.
MEMORY_FIELDS = ("patch_images", "map_memory")
NEWLINE = -2  # `image_token_index` of the learned vector that ends a row of a tile map

Array = Any  # a NumPy array in data/, a jax.Array in the model, a shape while compiling

# What is known of the rows of a batch before their values are (`Batch.layout`). Kernels need it.
ANY_LAYOUT = "any"
PACKED = "packed"  # the slots of a segment follow each other, and so do its positions
ONE_SEGMENT = "one_segment"  # PACKED, with one segment from the first slot on, then padding


@struct.dataclass
class MapMemory:
    """Image tokens that cross-attention reads as maps of tiles (`vision.tile_grids`).

    `index`, `taps` and `weights` are as `Batch.image_token_index`, `image_taps` and `tap_weights`,
    of T keys instead of S slots.
    """

    index: Array  # (B, T) int32
    views: Array  # (B, T) int32: the view of each key, of I from 1, or PADDING
    taps: Array | None = None  # (B, T, 4) int32
    weights: Array | None = None  # (B, T, 4) float32


@struct.dataclass
class Batch:
    """Inputs of the model. Attention patterns are part of the batch; the model has no prompts.

    A row consists of *segments*: documents that do not attend to each other. A segment is a trunk
    followed by branches: a token attends to the trunk and to its own branch, up to itself.
    Questions that share an image are one segment with the image as the trunk and the questions as
    branches.
    """

    tokens: Array  # (B, S) int32
    positions: Array  # (B, S) int32: every branch continues from the length of the trunk
    segment_ids: Array  # (B, S) int32: PADDING, or 1, 2, ...
    #: (B, S) int32: index into the row's I*M image tokens (with `vision.tile_layouts` I*J*M; at
    #: native resolution one for each square of patches), NO_IMAGE for a text token, or with
    #: `vision.tile_grids` NEWLINE
    image_token_index: Array
    image_mask: Array  # (B, S, I) bool: the images that a token attends to in cross-attention
    #: (B, S, 3) int32: time, row and column by which `rope.sections` rotate a token; None: all
    #: three are its position
    rope_positions: Array | None = None
    #: (B, S) int32: TRUNK, or 1, 2, ...; None: all TRUNK. Without branches and blocks, attention is
    #: causal within segments, for which a kernel needs no mask
    branch_ids: Array | None = None
    #: (B, S, 4) int32: with `vision.max_map_tiles`, the image tokens that a token of a resized map
    #: is interpolated from, instead of `image_token_index`. None: no token is interpolated
    image_taps: Array | None = None
    tap_weights: Array | None = None  # (B, S, 4) float32: the weight of each in the sum
    #: (B, S, I) bool: with `fusion.tokens_without_image` attend_all, the images that a token
    #: attends to if its row of `image_mask` is empty (such as a token before the first image). If
    #: it is empty here as well, the token skips cross-attention. None: all images
    no_image_mask: Array | None = None
    #: (B, I, height, width, channels) float32, normalized. I counts every view of an image: its
    #: tiles, then its thumbnail. With `vision.tile_layouts` (B, I, J, ...), and `image_mask` is
    #: (B, S, I*J). Without an encoder it may be (B, I, P, C) patches. At native resolution
    #: (B, P, C): the patches of all images, see `patch_images`. None: text only
    images: Array | None = None
    #: (B, P) int32, at native resolution: the image of each patch, from 1, or PADDING. The patches
    #: of an image follow one another, and in it the patches of each square that the projector
    #: merges; the image tokens have the same order
    patch_images: Array | None = None
    patch_places: Array | None = None  # (B, P, 2) int32: row and column of a patch in its image
    #: with `vision.tile_grids` and cross-attention, its keys; a row for each row of `images`
    map_memory: MapMemory | None = None
    #: (B,) int32: the row of `images` (and of `tile_layouts` and `tile_mask`) for each row of
    #: tokens. If set, questions share images, and `images` may have another B. None: one to one
    image_rows: Array | None = None
    #: (B, I) int32: the layout of tiles of each image; 0: no image
    tile_layouts: Array | None = None
    tile_mask: Array | None = None  # (B, I, J) bool: False for tiles of padding
    #: (B, S) int32: tokens of one block > 0 attend to each other in both directions; None: all 0
    block_ids: Array | None = None
    targets: Array | None = None  # (B, S) int32: the next token
    loss_weights: Array | None = None  # (B, S) float32: 1 where the target is scored
    #: (B, S) int32: number of each token's source in `data.mixture`, any in a slot of padding;
    #: None: no mixture
    source_ids: Array | None = None
    layout: str = struct.field(pytree_node=False, default=ANY_LAYOUT)


@struct.dataclass
class SegmentPattern:
    """Attention within segments, for kernels that need no mask.

    Segments of padding attend to themselves, whereas a mask hides padding; nothing reads these
    hidden states.
    """

    segments: Array  # (B, S) int32: such as `Batch.segment_ids`
    #: a token attends to the last `window` tokens of its segment, itself included; None: to all
    window: int | None = struct.field(pytree_node=False, default=None)
    #: () bool: the layer at hand has the window; None: every layer has it
    has_window: Array | None = None
    #: a row is one segment from the first slot on, then padding: causality is all of the pattern
    one_segment: bool = struct.field(pytree_node=False, default=False)
    causal: bool = struct.field(pytree_node=False, default=True)  # no token attends to a later one
    #: (B, S) int32: segments of sliding blocks that have no `window`; None: `segments`
    local_segments: Array | None = None

    def in_block(self, is_sliding: Array) -> "SegmentPattern":
        """Returns the pattern of a block of a stack with sliding blocks."""
        if self.local_segments is None:
            return self.replace(has_window=is_sliding)
        segments = jnp.where(is_sliding, self.local_segments, self.segments)
        return self.replace(segments=segments, local_segments=None)


def image_arrays(batch: Batch) -> dict[str, Array | None]:
    """Returns the fields `IMAGE_ARRAYS` of a batch."""
    return {name: getattr(batch, name) for name in IMAGE_ARRAYS}


def without_images(batch: Batch) -> Batch:
    """Returns a batch without its images; its tokens still refer to them.

    It keeps `MEMORY_FIELDS`.
    """
    kept = of_token_rows(batch, memory_fields(batch))
    return batch.replace(**dict.fromkeys(IMAGE_FIELDS), **kept)


def of_token_rows(batch: Batch, by_image_row: Any) -> Any:
    """Returns arrays with a row for each row of images as arrays with one for each of tokens."""
    if batch.image_rows is None:
        return by_image_row
    return jax.tree.map(lambda x: x[batch.image_rows], by_image_row)


def memory_fields(batch: Batch) -> dict[str, Any]:
    """Returns the fields `MEMORY_FIELDS` of a batch."""
    return {name: getattr(batch, name) for name in MEMORY_FIELDS}


def map_token_fields(function: Callable, *batches: Batch) -> Batch:
    """Applies a function to every field (B, S, ...) of batches `without_images`."""
    first = batches[0]
    fields = [batch.replace(**dict.fromkeys(MEMORY_FIELDS)) for batch in batches]
    return jax.tree.map(function, *fields).replace(**memory_fields(first))


@struct.dataclass
class DecoderInputs:
    """Inputs of the decoder. `memory` is None without images for cross-attention."""

    x: jax.Array  # (B, S, D): embeddings
    positions: jax.Array  # (B, S)
    mask: jax.Array  # (B, 1, S, T) bool: self-attention mask
    rope_positions: jax.Array | None = None  # (B, S, 3): see `Batch`
    #: set if `mask` (and `local_mask`) is this pattern and nothing else
    pattern: SegmentPattern | None = None
    deepstack: jax.Array | None = None  # (L, B, S, D): is added after the first L blocks
    memory: jax.Array | None = None  # (B, T, D): image tokens for cross-attention
    #: (L, B, T, D): the first L cross-attentions read them instead of `memory`, one each
    deepstack_memory: jax.Array | None = None
    #: (B, 1, S, T) bool: cross-attention mask; None: with `memory`, all that `has_image` allows
    memory_mask: jax.Array | None = None
    has_image: jax.Array | None = None  # (B, S) bool: the token has an image in `image_mask`
    #: (B, S) bool: the token passes cross-attention; None: equal to `has_image`
    attends: jax.Array | None = None
    #: (B, 1, S, T) bool: self-attention mask of blocks with a sliding window
    local_mask: jax.Array | None = None


@struct.dataclass
class BlockInputs:
    """Inputs that all blocks of a stack share."""

    mask: jax.Array | None = None  # (B, 1, S, T) bool: self-attention mask; None: all
    pattern: SegmentPattern | None = None  # see `DecoderInputs`
    rope: Any = None  # cosines and sines, (B, S, R) or (1, S, R) each
    deepstack: jax.Array | None = None  # (L, B, S, D): is added after the first L blocks
    memory: jax.Array | None = None  # (B, T, D)
    deepstack_memory: jax.Array | None = None  # (L, B, T, D): see `DecoderInputs`
    memory_mask: jax.Array | None = None  # (B, 1, S, T) bool: cross-attention mask; None: all
    has_image: jax.Array | None = None  # (B, S) bool: the token has an image; None: all have
    #: (B, S) bool: the token passes cross-attention; None: equal to `has_image`
    attends: jax.Array | None = None
    #: (B, 1, S, T) bool: self-attention mask of sliding blocks; None: no block slides
    local_mask: jax.Array | None = None
    local_rope: Any = None  # cosines and sines of sliding blocks; None: as `rope`
    index: jax.Array | None = None  # () int32: the next free slot of the cache


@struct.dataclass
class Cache:
    """KV cache: keys and values of the tokens so far, in a buffer of fixed length T."""

    index: jax.Array  # () int32: the next free slot
    segment_ids: jax.Array  # (B, T): of all slots, free ones included
    branch_ids: jax.Array | None  # (B, T)
    positions: jax.Array  # (B, T)
    block_ids: jax.Array | None  # (B, T)
    layers: Any  # by block of the repeating pattern and sublayer: keys, values (L, B, K, T, H)
    #: the decoder's inputs of every slot so far, without `memory`: longrope may recompute keys and
    #: values from them (nn/longrope.py). None: not needed, or nothing is cached yet
    inputs: DecoderInputs | None = None


@struct.dataclass
class EncoderOutput:
    """Outputs of an encoder; P includes the class token."""

    tokens: jax.Array  # (B, P, E): the last hidden states
    pooled: jax.Array | None = None  # (B, E): one vector per image
    features: jax.Array | None = None  # (B, P, E): input of the projector
    logits: jax.Array | None = None  # (B, V): image classes of the encoder's training


@struct.dataclass
class ContrastiveOutput:
    """Embeddings of B images and R texts, of norm 1, and their scaled dot products."""

    image_embeds: jax.Array  # (B, W)
    text_embeds: jax.Array  # (R, W)
    logits_per_image: jax.Array  # (B, R)


@struct.dataclass
class Output:
    """Output of a vision-language model."""

    logits: jax.Array  # (B, S, V)
    cache: Cache | None = None


@struct.dataclass
class State:
    """Training state."""

    step: jax.Array  # () int32: number of optimizer steps so far
    params: Any
    optimizer: Any  # optimizer state
