"""Images of a batch, from arrays with the names and layouts of transformers."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import einops
import numpy as np

from vlm_jax.config import (
    CHANNELS,
    ConfigError,
    Experiment,
)
from vlm_jax.config.tile_maps import TAPS, Shape, choose_grid, image_length
from vlm_jax.data import native
from vlm_jax.data.fields import map_tokens
from vlm_jax.structs import NO_IMAGE, Batch

Arrays = Mapping[str, np.ndarray]
# The images that each token attends to; in the first, their tiles.
IMAGE_MASKS = ("cross_attention_mask", "image_attention_mask")


def image_batch(cfg: Experiment, arrays: Arrays) -> Batch:
    """Returns the batch for `VLM.image_tokens`: a row per image, or per row of tiled images.

    With `vision.tile_grids` it is a row of all images for `VLM.decoder_inputs`: a slot for each of
    their tokens.
    """
    pixels = np.asarray(arrays["pixel_values"])
    if cfg.vision.is_native:
        patches, grids = _native_images(cfg, arrays)
        packed = native.pack([patches], [grids], cfg.vision.patch_square)
        ids = np.zeros((1, 1), np.int32)
        images = packed._asdict() | {"image_mask": np.zeros((1, 1, len(grids)), bool)}
    elif cfg.fusion.image_in_memory:
        ids = np.zeros((len(pixels), 1), np.int32)
        own = {name: x for name, x in arrays.items() if name not in IMAGE_MASKS}
        images = _in_memory(cfg, own, ids, None)
    else:
        if cfg.vision.tile_grids:
            return _map_batch(cfg, arrays)
        if cfg.vision.has_encoder:
            pixels = _whole_images(cfg, arrays)
        else:
            pixels = _patches(cfg, arrays)[None]
        ids = np.zeros((len(pixels), 1), np.int32)
        images = {"images": pixels[:, None], "image_mask": np.zeros((*ids.shape, 1), bool)}
    text = {
        "tokens": ids,
        "positions": ids,
        "segment_ids": ids + 1,
        "image_token_index": ids - 1,
    }
    return Batch(**(text | images))


def channels_last(images: np.ndarray) -> np.ndarray:
    """Moves channels from (..., channels, height, width) to (..., height, width, channels)."""
    return np.moveaxis(np.asarray(images), -3, -1)


def image_fields(cfg: Experiment, arrays: Arrays, ids: np.ndarray, image_token: int | None) -> dict:
    """Returns the image fields of the batch."""
    fusion = cfg.fusion
    if fusion.image_in_sequence == fusion.image_in_memory:
        raise ConfigError(
            "pixel_values are for models with images either in the sequence or in "
            f"cross-attention, not for fusion.kind {fusion.kind}."
        )
    to_fields = _in_sequence if fusion.image_in_sequence else _in_memory
    return to_fields(cfg, arrays, ids, image_token)


def _in_sequence(cfg: Experiment, arrays: Arrays, ids: np.ndarray, image_token: int) -> dict:
    """Distributes images, in reading order over all rows, to the image tokens of each row.

    The ids of image tokens may lie beyond the vocabulary; they become 0.
    """
    is_image = ids == image_token
    if cfg.vision.tile_grids:
        return {"tokens": np.where(is_image, 0, ids)} | _in_tile_maps(cfg, arrays, is_image)
    patches_only = not cfg.vision.has_encoder
    if patches_only:
        images, tokens_each = _patches(cfg, arrays), 1
    else:
        images, tokens_each = _whole_images(cfg, arrays), cfg.image_tokens
    counts = is_image.sum(axis=1)
    if counts.sum() != len(images) * tokens_each or (counts % tokens_each).any():
        raise ConfigError(
            f"The {' + '.join(map(str, counts))} image tokens (id {image_token}) in the rows of "
            "input_ids do not match "
            f"pixel_values: {len(images)} {'patches' if patches_only else 'images'} of "
            f"{tokens_each} tokens each."
        )
    filled = row_by_row(images, counts // tokens_each)
    if patches_only:
        filled = filled[:, None]
    return {
        "tokens": np.where(is_image, 0, ids),
        "images": filled,
        "image_token_index": np.where(is_image, np.cumsum(is_image, axis=1) - 1, NO_IMAGE).astype(
            np.int32
        ),
        "image_mask": np.zeros((*ids.shape, filled.shape[1]), bool),
    }


def native_fields(
    cfg: Experiment, arrays: Arrays, is_token: np.ndarray, image_token: int
) -> dict[str, np.ndarray]:
    """Distributes images at native resolution, in reading order over all rows.

    Positions of M-RoPE count the tokens that are not padding.
    """
    ids = np.asarray(arrays["input_ids"], np.int32)
    patches, grids = _native_images(cfg, arrays)
    side = cfg.vision.patch_square
    token_grids = [(rows // side, columns // side) for rows, columns in grids]
    is_image = (ids == image_token) & is_token
    # An answer may have the id of an image token without being one.
    if "mm_token_type_ids" in arrays:
        is_image &= checked_array(arrays, "mm_token_type_ids", ids.shape) == 1
    # The image of each image token, from 0, over all rows.
    sizes = [rows * columns for rows, columns in token_grids]
    owners = np.repeat(np.arange(len(grids)), sizes)
    if len(owners) != is_image.sum():
        name = "image_grid_thw" if "image_grid_thw" in arrays else "the sizes of pixel_values"
        raise ConfigError(
            f"The {' + '.join(map(str, is_image.sum(axis=1)))} image tokens (id {image_token}) in "
            f"the rows of input_ids do not match {name}: {len(grids)} images of "
            f"{' + '.join(map(str, sizes))} tokens."
        )
    rows_patches, rows_grids = [], []
    rope_positions = np.zeros((*ids.shape, 3), np.int32)
    for row, own in enumerate(np.split(owners, np.cumsum(is_image.sum(axis=1))[:-1])):
        images = np.unique(own)
        if np.sum([sizes[image] for image in images], dtype=int) != len(own):
            raise ConfigError(f"row {row} of input_ids has image tokens of a part of an image.")
        rows_patches.append([patches[image] for image in images])
        rows_grids.append([grids[image] for image in images])
        numbers = np.zeros(ids.shape[1], np.int32)
        if len(own):
            numbers[is_image[row]] = own - own[0] + 1
        rope_positions[row, is_token[row]] = native.rope_positions(
            numbers[is_token[row]], [token_grids[image] for image in images]
        )
    longest = max(sum(map(len, row)) for row in rows_patches)
    length = native.padded_length(longest, side)
    packed = native.pack(rows_patches, rows_grids, side, length)
    return packed._asdict() | {
        "tokens": np.where(is_image, 0, ids),
        "image_token_index": np.where(is_image, np.cumsum(is_image, axis=1) - 1, NO_IMAGE).astype(
            np.int32
        ),
        "image_mask": np.zeros((*ids.shape, max(map(len, rows_grids))), bool),
        "rope_positions": rope_positions if cfg.decoder.rope.sections else None,
    }


def _sized_images(
    cfg: Experiment, arrays: Arrays
) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """As `_native_images`, for padded images with their `image_sizes` in pixels (Pixtral)."""
    patch, side = cfg.vision.patch_size_px, cfg.vision.patch_square
    images = channels_last(checked_array(arrays, "pixel_values", (None, CHANNELS, None, None)))
    sizes = np.full((len(images), 2), images.shape[1:3])
    if "image_sizes" in arrays:
        sizes = checked_array(arrays, "image_sizes", sizes.shape)
    if (sizes % (patch * side)).any() or (sizes < 1).any() or (sizes > images.shape[1:3]).any():
        raise ConfigError(
            f"image_sizes {sizes.tolist()} must be heights and widths in multiples of "
            f"{patch * side} px within pixel_values {images.shape[1]} x {images.shape[2]}."
        )
    patches, grids = [], []
    for image, (height, width) in zip(images, sizes.tolist()):
        patches.append(native.to_patches(image[:height, :width], patch, side))
        grids.append((height // patch, width // patch))
    return patches, grids


def _native_images(
    cfg: Experiment, arrays: Arrays
) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Patches (P, C) of one frame, and their rows and columns, of every image."""
    if np.ndim(arrays.get("pixel_values")) == 4:
        return _sized_images(cfg, arrays)
    vision, side = cfg.vision, cfg.vision.patch_square
    grids = checked_array(arrays, "image_grid_thw", (None, 3))
    if (grids[:, 0] != 1).any() or (grids[:, 1:] % side).any() or (grids < 1).any():
        raise ConfigError(
            f"image_grid_thw {grids.tolist()} must have one frame for each image, and rows and "
            f"columns in multiples of {side}: videos are not supported."
        )
    count = int(grids.prod(axis=1).sum())
    values = checked_array(arrays, "pixel_values", (count, vision.patch_frames * vision.patch_dim))
    frames = einops.rearrange(
        values,
        "P (c t p q) -> t P (p q c)",
        c=CHANNELS,
        t=vision.patch_frames,
        p=vision.patch_size_px,
    )
    if (frames != frames[:1]).any():
        raise ConfigError("pixel_values has patches of several frames: videos are not supported.")
    starts = np.cumsum(grids.prod(axis=1))[:-1]
    patches = np.split(np.asarray(frames[0], np.float32), starts)
    return patches, [(int(rows), int(columns)) for _, rows, columns in grids]


class MapImage(NamedTuple):
    """An image of LLaVA-NeXT."""

    views: np.ndarray  # (J, height, width, channels): the tiles, then the whole image
    size: Shape | None  # (height, width) in px before any resize; None: it is not cut into tiles


def count_map_tokens(cfg: Experiment, size: Shape | None) -> int:
    """Returns the number of tokens of an image of `MapImage.size`."""
    if size is None:
        return cfg.image_tokens + 1
    return image_length(cfg.vision, cfg.projector, size)


def _in_tile_maps(cfg: Experiment, arrays: Arrays, is_image: np.ndarray) -> dict:
    """Distributes images with their own numbers of tokens, in reading order over all rows."""
    images = _map_images(cfg, arrays)
    lengths = [count_map_tokens(cfg, image.size) for image in images]
    ends = np.cumsum([0, *lengths])
    counts = is_image.sum(axis=1)
    row_ends = np.cumsum(counts)
    if not np.isin(row_ends, ends).all() or row_ends[-1] != ends[-1]:
        raise ConfigError(
            f"The {' + '.join(map(str, counts))} image tokens in the rows of input_ids do not "
            f"match image_sizes: images of {' + '.join(map(str, lengths))} tokens."
        )
    fields = {"image_token_index": np.full(is_image.shape, NO_IMAGE, np.int32)}
    if cfg.vision.max_map_tiles is not None:
        fields["image_taps"] = np.zeros((*is_image.shape, TAPS), np.int32)
        fields["tap_weights"] = np.zeros((*is_image.shape, TAPS), np.float32)
    view_counts, first = [], 0
    for row, end in enumerate(np.searchsorted(ends, row_ends)):
        placed, view_count = _place_images(cfg, images[first:end])
        for name, values in placed.items():
            fields[name][row, is_image[row]] = values
        view_counts.append(view_count)
        first = end
    views = np.concatenate([image.views for image in images])
    filled = row_by_row(views, np.array(view_counts))
    return fields | {
        "images": filled,
        "image_mask": np.zeros((*is_image.shape, filled.shape[1]), bool),
    }


def _place_images(cfg: Experiment, images: Sequence[MapImage]) -> tuple[dict[str, np.ndarray], int]:
    """Returns the fields of `map_tokens` of the images of a row, and the number of their views."""
    parts, first_view = [], 0
    for image in images:
        last_view = first_view + len(image.views) - 1
        parts.append(map_tokens(cfg.vision, cfg.projector, image.size, first_view, last_view))
        first_view = last_view + 1
    names = parts[0] if parts else ()
    return {name: np.concatenate([part[name] for part in parts]) for name in names}, first_view


def _map_images(cfg: Experiment, arrays: Arrays) -> list[MapImage]:
    """Reads images from `pixel_values`, `image_sizes` and, if there is one, `batch_num_images`.

    The views of all images follow one another, or each image has as many as the largest.
    """
    images = map_sizes(arrays)
    counts = [1 + _count_tiles(cfg, size) for size in images]
    pixels = channels_last(_all_views(cfg, arrays, counts)).astype(np.float32)
    views = np.split(pixels, np.cumsum(counts)[:-1])
    return [
        MapImage(np.roll(own, -1, axis=0), size) for own, size in zip(views, images, strict=True)
    ]


def map_sizes(arrays: Arrays) -> list[Shape | None]:
    """Returns `MapImage.size` of every image."""
    sizes = checked_array(arrays, "image_sizes", (None, 2)).tolist()
    if not sizes:
        raise ConfigError("image_sizes is empty: leave pixel_values out of a text without images.")
    row_counts = np.asarray(arrays.get("batch_num_images", np.ones(len(sizes), int)))
    # Several images in a row are not cut.
    is_cut = np.repeat(row_counts == 1, row_counts)
    if len(is_cut) != len(sizes):
        raise ConfigError(
            f"batch_num_images {row_counts.tolist()} does not match the {len(sizes)} images of "
            "image_sizes."
        )
    images = []
    for size, cut in zip(sizes, is_cut.tolist()):
        if min(size) < 1:
            raise ConfigError(f"image_sizes has {size}: a height and a width are at least 1.")
        images.append(tuple(size) if cut else None)
    return images


def _count_tiles(cfg: Experiment, size: Shape | None) -> int:
    if size is None:
        return 0
    return math.prod(choose_grid(size, cfg.vision.tile_grids, cfg.vision.image_size_px))


def _all_views(cfg: Experiment, arrays: Arrays, counts: Sequence[int]) -> np.ndarray:
    """Views (sum of `counts`, channels, height, width), each image's whole view first."""
    shape = (CHANNELS, *[cfg.vision.image_size_px] * 2)
    if np.ndim(arrays.get("pixel_values")) == 1 + len(shape):
        return checked_array(arrays, "pixel_values", (sum(counts), *shape))
    padded = checked_array(arrays, "pixel_values", (len(counts), None, *shape))
    if padded.shape[1] < max(counts):
        raise ConfigError(
            f"pixel_values has {padded.shape[1]} views of an image, but image_sizes needs "
            f"{max(counts)}."
        )
    return np.concatenate([own[:count] for own, count in zip(padded, counts)])


def _map_batch(cfg: Experiment, arrays: Arrays) -> Batch:
    """Returns a row with a slot for every token of all images."""
    sizes = [image.size for image in _map_images(cfg, arrays)]
    length = sum(count_map_tokens(cfg, size) for size in sizes)
    slots = np.zeros((1, length), np.int32)
    fields = _in_tile_maps(cfg, arrays, slots == 0)
    return Batch(**({"tokens": slots, "positions": slots, "segment_ids": slots + 1} | fields))


def _patches(cfg: Experiment, arrays: Arrays) -> np.ndarray:
    """Fuyu: patches (P, C) of all images, concatenated; the images may differ in size."""
    patches = np.asarray(arrays["pixel_values"])
    patches = patches.reshape(-1, patches.shape[-1])
    return checked_array({"pixel_values": patches}, "pixel_values", (None, cfg.vision.patch_dim))


def _whole_images(cfg: Experiment, arrays: Arrays) -> np.ndarray:
    """Images (images, height, width, channels); blank ones that fill up rows are left out."""
    shape = (CHANNELS, *[cfg.vision.image_size_px] * 2)
    if np.shape(arrays.get("pixel_values"))[2:] != shape:
        return channels_last(checked_array(arrays, "pixel_values", (None, *shape)))
    images = np.reshape(arrays["pixel_values"], (-1, *shape))
    is_image = images.any(axis=(1, 2, 3))
    mask = arrays.get("pixel_attention_mask")
    if mask is not None and not np.reshape(mask, (-1, *shape[1:]))[is_image].all():
        raise ConfigError(
            "pixel_attention_mask has padding within an image: only whole images are supported."
        )
    return channels_last(images[is_image])


class EncoderInputs(NamedTuple):
    """Images of an encoder alone, each a row: as images, or as patches of SigLIP 2."""

    images: np.ndarray  # (B, height, width, channels), or (B, P, C) with the fields below
    patch_images: np.ndarray | None = None  # (B, P) int32: 1, or PADDING
    patch_places: np.ndarray | None = None  # (B, P, 2) int32: row and column of each patch


def encoder_inputs(arrays: Arrays) -> EncoderInputs:
    """Returns the inputs of an encoder for `pixel_values`.

    `spatial_shapes` has the rows and columns of patches of each image of SigLIP 2; further patches
    are padding, so `pixel_attention_mask` says nothing more.

    Raises:
      ConfigError: `spatial_shapes` is missing, has another shape or exceeds the patches.
    """
    pixels = np.asarray(arrays["pixel_values"])
    if pixels.ndim != 3:
        for name in ("pixel_attention_mask", "spatial_shapes"):
            if name in arrays:
                raise ConfigError(f"{name} needs patches as pixel_values, of the shape (B, P, C).")
        return EncoderInputs(channels_last(pixels))
    grids = checked_array(arrays, "spatial_shapes", (len(pixels), 2)).tolist()
    wrong = [grid for grid in grids if not 0 < math.prod(grid) <= pixels.shape[1]]
    if wrong:
        raise ConfigError(
            f"spatial_shapes {wrong[0]} does not fit the {pixels.shape[1]} patches of pixel_values."
        )
    patches = [[x[: math.prod(grid)]] for x, grid in zip(pixels, grids)]
    packed = native.pack(patches, [[grid] for grid in grids], 1, length=pixels.shape[1])
    return EncoderInputs(*packed)


def row_by_row(images: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Splits images (sum of I, ...) by row, padded with zeros to (B, I, ...); I is at least 1."""
    filled = np.zeros((len(counts), max(1, counts.max()), *images.shape[1:]), np.float32)
    for target, row in zip(filled, np.split(images, np.cumsum(counts)[:-1])):
        target[: len(row)] = row
    return filled


def _in_memory(cfg: Experiment, arrays: Arrays, ids: np.ndarray, image_token: int | None) -> dict:
    """Images for cross-attention: one a row, read by every token, or any number of images.

    The text has a placeholder for each of any number of images (Idefics); without a mask, every
    token attends to every image.
    """
    if cfg.vision.tile_layouts:
        return _in_tiles(cfg, arrays, ids)
    if cfg.fusion.placeholder:
        images = checked_array(arrays, "pixel_values", (len(ids), None, CHANNELS, None, None))
        shape = (*ids.shape, images.shape[1])
        arrays = {"image_attention_mask": np.ones(shape), **arrays}
        mask = checked_array(arrays, "image_attention_mask", shape)
        return {"images": channels_last(images), "image_mask": mask.astype(bool)}
    images = checked_array(arrays, "pixel_values", (len(ids), CHANNELS, None, None))
    return {"images": channels_last(images)[:, None], "image_mask": np.ones((*ids.shape, 1), bool)}


def _in_tiles(cfg: Experiment, arrays: Arrays, ids: np.ndarray) -> dict:
    """Llama 3.2 Vision: I images of J tiles; without a mask, every token attends to every tile."""
    rows, tiles, side = len(ids), cfg.vision.tiles, cfg.vision.image_size_px
    images = checked_array(arrays, "pixel_values", (rows, None, tiles, CHANNELS, side, side))
    shape = images.shape[:3]
    layouts = checked_array(arrays, "aspect_ratio_ids", shape[:2])
    if not np.isin(layouts, range(1 + len(cfg.vision.tile_layouts))).all():
        raise ConfigError(
            f"aspect_ratio_ids {layouts.tolist()} must be at most {len(cfg.vision.tile_layouts)}."
        )
    arrays = {"cross_attention_mask": np.ones((*ids.shape, *shape[1:])), **arrays}
    mask = checked_array(arrays, "cross_attention_mask", (*ids.shape, *shape[1:]))
    return {
        "images": channels_last(images),
        "tile_layouts": layouts.astype(np.int32),
        "tile_mask": checked_array(arrays, "aspect_ratio_mask", shape).astype(bool),
        "image_mask": mask.reshape(*ids.shape, -1).astype(bool),
    }


def checked_array(arrays: Arrays, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Returns an argument; ConfigError if it is missing or has another shape (None: any length)."""
    actual = np.shape(arrays.get(name))
    is_fitting = len(actual) == len(shape) and all(
        n in (None, length) for n, length in zip(shape, actual)
    )
    if not is_fitting:
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ConfigError(f"{name} must have the shape ({expected}), not {actual or 'none'}.")
    return np.asarray(arrays[name])
