"""Common beginning of two batches of one row: tokens with equal keys and values in a KV cache."""

import jax
import numpy as np

from vlm_jax.config import Model
from vlm_jax.structs import IMAGE_ARRAYS, Batch

TOKEN_FIELDS = ("tokens", "positions", "segment_ids", "branch_ids", "image_token_index")


def count_images(old: Batch, new: Batch) -> int:
    """Returns the number of leading images (I) that two batches have in common.

    At native resolution it is the number of their patches.
    """
    if old.images is None or new.images is None or old.images.shape[2:] != new.images.shape[2:]:
        return 0
    if not _has_same_maps(old, new):
        return 0
    count = min(old.images.shape[1], new.images.shape[1])
    names = [name for name in IMAGE_ARRAYS if name != "map_memory"]
    for number in range(count):
        if not all(_has_same(old, new, name, number) for name in names):
            count = number
            break
    if new.patch_images is None:
        return count
    # An image that continues after the common patches is not in common.
    for batch in (old, new):
        ids = np.asarray(batch.patch_images)[0]
        if count < len(ids):
            count = int(np.argmax(np.append(ids[:count] == ids[count], True)))
    return count


def count_packed(batch: Batch, patches: int) -> int:
    """Returns the number of images in the first patches of a batch at native resolution."""
    return int(np.max(batch.patch_images[0, :patches], initial=0))


def _has_same_maps(old: Batch, new: Batch) -> bool:
    """Returns whether the maps of tiles of two batches begin with the same keys."""
    if old.map_memory is None or new.map_memory is None:
        return old.map_memory is new.map_memory
    length = min(old.map_memory.index.shape[1], new.map_memory.index.shape[1])
    return all(
        np.array_equal(old_values[:, :length], new_values[:, :length])
        for old_values, new_values in zip(*map(jax.tree.leaves, (old.map_memory, new.map_memory)))
    )


def _has_same(old: Batch, new: Batch, name: str, number: int) -> bool:
    old_values, new_values = getattr(old, name), getattr(new, name)
    if old_values is None or new_values is None:
        return old_values is new_values
    return np.array_equal(old_values[:, number], new_values[:, number])


def count_tokens(cfg: Model, old: Batch, new: Batch, images: int, image_tokens: int) -> int:
    """Returns the number of leading tokens of `new` with the same keys and values as in `old`.

    The last token is not among them: it is always read, for the logits.

    Args:
      images: result of `count_images`.
      image_tokens: number of image tokens of these images.
    """
    length = min(old.tokens.shape[1], new.tokens.shape[1] - 1)
    is_same = np.asarray(new.image_token_index)[0, :length] < image_tokens
    for name in TOKEN_FIELDS:
        old_values, new_values = getattr(old, name), getattr(new, name)
        if old_values is not None:
            is_same &= np.asarray(old_values)[0, :length] == np.asarray(new_values)[0, :length]
    width = max(old.image_mask.shape[-1], new.image_mask.shape[-1])
    for mask in (_own_images, _attended_images):
        old_mask, new_mask = mask(cfg, old, width), mask(cfg, new, width)
        is_same &= (old_mask[:length] == new_mask[:length]).all(-1)
    if new.images is not None:
        if new.patch_images is None:
            masks = images * (new.image_mask.shape[-1] // new.images.shape[1])
        else:
            masks = count_packed(new, images)
        is_same &= ~_attended_images(cfg, new, width)[:length, masks:].any(-1)
    count = int(np.argmin(np.append(is_same, False)))
    for batch in (old, new):
        count = _before_open_block(batch, count)
    return count


def _own_images(cfg: Model, batch: Batch, width: int) -> np.ndarray:
    """(S, width) bool: `image_mask`."""
    mask = np.asarray(batch.image_mask)[0]
    return np.pad(mask, ((0, 0), (0, width - mask.shape[1])))


def _attended_images(cfg: Model, batch: Batch, width: int) -> np.ndarray:
    """(S, width) bool: as `fusion.mask_tokens_without_image`, for styles that use it."""
    mask = _own_images(cfg, batch, width)
    if cfg.fusion.tokens_without_image != "attend_all":
        return mask
    others = np.ones_like(batch.image_mask) if batch.no_image_mask is None else batch.no_image_mask
    others = np.pad(others[0], ((0, 0), (0, width - others.shape[-1])))
    return mask | (~mask.any(-1, keepdims=True) & others)


def _before_open_block(batch: Batch, count: int) -> int:
    """Returns the start of a block (`block_ids`) that continues after `count` tokens, else `count`.

    Its tokens attend to all of the block.
    """
    if batch.block_ids is None:
        return count
    blocks = np.asarray(batch.block_ids)[0]
    is_open = (blocks[:count] > 0) & np.isin(blocks[:count], blocks[count:])
    return int(np.argmax(np.append(is_open, True)))
