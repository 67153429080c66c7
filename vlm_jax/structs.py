"""The doors between rooms: small structs whose every field has its dimension letters (see `axes.py`)."""

from typing import Any

import jax
from flax import struct

PADDING = 0  # segment id of a slot that holds no token
TRUNK = 0  # branch id of a token that every later token of its segment sees
NO_IMAGE = -1  # image slot of a text token

Array = Any  # a numpy array where data makes it, a jax.Array in the model, a shape while compiling


@struct.dataclass
class Batch:
    """What data hands over. What a token may see travels with it; the model knows nothing of prompts.

    A row is a few *segments* (documents that never see each other). A segment is a trunk followed by branches: a
    token sees the trunk and its own branch, up to itself. Shared-image packing is one segment whose trunk is the image
    and whose branches are the questions.
    """

    tokens: Array  # (B, S) int32
    positions: Array  # (B, S) int32: every branch continues from the length of the trunk
    segment_ids: Array  # (B, S) int32: PADDING, or 1, 2, ...
    branch_ids: Array  # (B, S) int32: TRUNK, or 1, 2, ...
    #: (B, S) int32: index into the row's I*M image tokens (with `vision.tile_layouts` I*J*M), or
    #: NO_IMAGE for a text token
    image_token_index: Array
    image_mask: Array  # (B, S, I) bool: the images that a token attends to in cross-attention
    #: (B, S, I) bool: with `fusion.tokens_without_image` attend_all, the images that a token
    #: attends to if its row of `image_mask` is empty (such as a token before the first image). Empty here as well:
    #: the token skips cross-attention. None: all images
    no_image_mask: Array | None = None
    #: (B, I, height, width, channels) float32, normalised. I counts every view of an image: its
    #: tiles, then its thumbnail. With `vision.tile_layouts` (B, I, J, ...), and `image_mask` is
    #: (B, S, I*J). Without an encoder it may be (B, I, P, C) patches. None: text only
    images: Array | None = None
    #: (B,) int32: the row of `images` (and of `tile_layouts` and `tile_mask`) that belongs to each
    #: row of tokens. Questions that share images set it; `images` then has a B of its own.
    #: None: one to one
    image_rows: Array | None = None
    #: (B, I) int32: the layout of tiles of each image; 0: no image
    tile_layouts: Array | None = None
    tile_mask: Array | None = None  # (B, I, J) bool: False for tiles of padding
    #: (B, S) int32: tokens of one block > 0 attend to each other in both directions; None: all 0
    block_ids: Array | None = None
    targets: Array | None = None  # (B, S) int32: the next token
    loss_weights: Array | None = None  # (B, S) float32: 1 where the target is scored


@struct.dataclass
class DecoderInputs:
    """What fusion hands the decoder. `memory` is there only when there is something to cross-attend to."""

    x: jax.Array  # (B, S, D)
    positions: jax.Array  # (B, S)
    mask: jax.Array  # (B, 1, S, T) bool: which keys a token sees
    memory: jax.Array | None = None  # (B, T, D): image tokens for cross-attention
    memory_mask: jax.Array | None = None  # (B, 1, S, T) bool: which of them a token reads
    reads: jax.Array | None = None  # (B, S) bool: whether it has an image to read
    #: (B, S) bool: whether it passes cross-attention; None: as `reads`
    attends: jax.Array | None = None
    #: (B, 1, S, T) bool: the mask of blocks with a sliding window
    local_mask: jax.Array | None = None


@struct.dataclass
class BlockInputs:
    """What every block of a stack reads and none changes."""

    mask: jax.Array | None = None  # (B, 1, S, T) bool: which keys a token sees; None: all
    rope: Any = None  # cosines and sines, (B, S, R) each
    memory: jax.Array | None = None  # (B, T, D)
    memory_mask: jax.Array | None = None  # (B, 1, S, T) bool; None: all
    #: (B, S) bool: whether a token has an image to read; None: every one
    reads: jax.Array | None = None
    #: (B, S) bool: whether it passes cross-attention; None: as `reads`
    attends: jax.Array | None = None
    #: (B, 1, S, T) bool: the mask of blocks that slide; None: none does
    local_mask: jax.Array | None = None
    local_rope: Any = None  # cosines and sines of blocks that slide; None: as the others
    index: jax.Array | None = None  # () int32: the next free slot of the cache


@struct.dataclass
class Cache:
    """Keys and values of the tokens so far, in a buffer of fixed length T."""

    index: jax.Array  # () int32: the next free slot
    segment_ids: jax.Array  # (B, T): of every slot, the slots to come included
    branch_ids: jax.Array  # (B, T)
    positions: jax.Array  # (B, T)
    block_ids: jax.Array | None  # (B, T)
    layers: Any  # per block of the repeating period and sublayer: keys and values (L, B, K, T, H)
    #: the decoder's inputs of every slot so far, without `memory`: longrope may recompute the keys
    #: and values from them (nn/longrope.py). None: not needed, or nothing is cached yet
    inputs: DecoderInputs | None = None


@struct.dataclass
class EncoderOutput:
    """An encoder's outputs; P counts the class token, too."""

    tokens: jax.Array  # (B, P, E): the last hidden state
    pooled: jax.Array | None = None  # (B, E): one vector an image
    features: jax.Array | None = None  # (B, P, E): what the projector reads
    logits: jax.Array | None = None  # (B, V): of the classes that the encoder was trained on


@struct.dataclass
class ContrastiveOutput:
    """B images and R texts, each a vector of length 1, and their products, scaled."""

    image_embeds: jax.Array  # (B, W)
    text_embeds: jax.Array  # (R, W)
    logits_per_image: jax.Array  # (B, R)


@struct.dataclass
class Output:
    logits: jax.Array  # (B, S, V)
    cache: Cache | None = None


@struct.dataclass
class State:
    """All that training changes."""

    step: jax.Array  # () int32: optimizer steps done
    params: Any
    optimizer: Any
