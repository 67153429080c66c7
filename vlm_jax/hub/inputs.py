"""Model inputs as transformers names them -> a `Batch`.

`input_ids`, `attention_mask`, `position_ids`, `token_type_ids`, `pixel_values`, `aspect_ratio_ids`, `aspect_ratio_mask`,
`cross_attention_mask`, `decoder_input_ids`, `decoder_attention_mask`; images are (..., channels, height, width) there.
"""

from collections.abc import Mapping

import numpy as np

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.structs import NO_IMAGE, TRUNK, Batch

Arrays = Mapping[str, np.ndarray]
TEXT = ("input_ids", "attention_mask", "position_ids")
OF_KIND = {  # fusion.kind -> the arguments that are understood
    "text_only": TEXT,
    "unified": (*TEXT, "token_type_ids", "pixel_values"),
    "cross_attention": (*TEXT, "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"),
    "encoder_decoder": ("decoder_input_ids", "decoder_attention_mask", "pixel_values"),
}


def to_batch(cfg: Experiment, arrays: Arrays, image_token: int | None, generating: bool = False) -> Batch:
    """The arguments of one forward pass -> a batch without targets.

    Args:
      image_token: the id that stands for an image token in the sequence.
      generating: positions count the tokens that are there, as `generate` of transformers has it; otherwise slots.

    Raises:
      ConfigError: the image tokens in the text do not match the images.
    """
    prefix = "decoder_" if cfg.fusion.kind == "encoder_decoder" else ""
    ids = np.asarray(arrays[f"{prefix}input_ids"], np.int32)
    there = np.asarray(arrays.get(f"{prefix}attention_mask", np.ones_like(ids))).astype(bool)
    text = Batch(
        tokens=ids,
        positions=_positions(cfg, arrays, there, generating),
        segment_ids=there.astype(np.int32),
        branch_ids=np.full_like(ids, TRUNK),
        image_slots=np.full_like(ids, NO_IMAGE),
        image_mask=np.zeros((*ids.shape, 0), bool),
        block_ids=_blocks(arrays, there) if cfg.fusion.prefix == "bidirectional" else None,
    )
    if "pixel_values" not in arrays:
        return text
    return text.replace(**IMAGES[cfg.fusion.kind](cfg, arrays, ids, image_token))


def _positions(cfg: Experiment, arrays: Arrays, there: np.ndarray, generating: bool) -> np.ndarray:
    if "position_ids" in arrays:
        return np.broadcast_to(np.asarray(arrays["position_ids"], np.int32), there.shape)
    first = int(cfg.fusion.prefix == "bidirectional")  # PaliGemma counts from 1
    if generating:
        return np.maximum(np.cumsum(there, axis=1) - 1, 0).astype(np.int32) + first
    return np.broadcast_to(np.arange(there.shape[1], dtype=np.int32) + first, there.shape)


def _blocks(arrays: Arrays, there: np.ndarray) -> np.ndarray:
    """The prefix, whose `token_type_ids` are 0 (without them: all that is there), is one block."""
    types = np.asarray(arrays.get("token_type_ids", np.zeros_like(there)))
    return (there & (types == 0)).astype(np.int32)


def channels_last(images: np.ndarray) -> np.ndarray:
    """(..., channels, height, width) -> (..., height, width, channels)."""
    return np.moveaxis(np.asarray(images), -3, -1)


def _in_sequence(cfg: Experiment, arrays: Arrays, ids: np.ndarray, image_token: int) -> dict:
    """Images in reading order over all rows; a row takes as many as its image tokens fill."""
    patches = np.asarray(arrays["pixel_values"])
    images = patches if cfg.vision.kind == "none" else channels_last(patches)
    is_image = ids == image_token
    per_image = images.shape[1] if cfg.vision.kind == "none" else _tokens_of(cfg, images)
    if cfg.vision.kind == "none":  # one image a row, of which the text may show a part
        counts = is_image.any(axis=1).astype(int)
    else:
        counts = is_image.sum(axis=1) // per_image
        if is_image.sum() != len(images) * per_image or (is_image.sum(axis=1) % per_image).any():
            raise ConfigError(
                f"{is_image.sum()} image tokens do not match {len(images)} images of {per_image} tokens each."
            )
    slots = np.where(is_image, np.cumsum(is_image, axis=1) - 1, NO_IMAGE).astype(np.int32)
    rows = np.split(images, np.cumsum(counts)[:-1])
    most = max(1, counts.max())
    filled = np.stack(
        [np.concatenate([row, np.zeros((most - len(row), *images.shape[1:]), np.float32)]) for row in rows]
    )
    return {"images": filled, "image_slots": slots, "image_mask": np.zeros((*ids.shape, most), bool)}


def _tokens_of(cfg: Experiment, images: np.ndarray) -> int:
    """M for images of this size, which may not be that of the config."""
    rows, columns = (side // cfg.vision.patch_size_px for side in images.shape[1:3])
    return rows * columns + cfg.vision.extra_tokens if cfg.projector.kind in ("linear", "mlp") else cfg.image_tokens


def _in_tiles(cfg: Experiment, arrays: Arrays, ids: np.ndarray, image_token: int | None) -> dict:
    """Llama 3.2 Vision: (B, I, J, channels, height, width), and per token and tile whether it is read."""
    images = channels_last(arrays["pixel_values"])
    everything = np.ones((*ids.shape, *images.shape[1:3]), bool)
    mask = np.asarray(arrays.get("cross_attention_mask", everything)).astype(bool)
    there = np.asarray(arrays.get("aspect_ratio_mask", np.ones(images.shape[:3]))).astype(bool)
    return {
        "images": images,
        "tile_layouts": np.asarray(arrays["aspect_ratio_ids"], np.int32),
        "tile_mask": there,
        "image_mask": mask.reshape(*ids.shape, -1),
    }


def _in_memory(cfg: Experiment, arrays: Arrays, ids: np.ndarray, image_token: int | None) -> dict:
    """One image a row, which every token reads."""
    return {"images": channels_last(arrays["pixel_values"])[:, None], "image_mask": np.ones((*ids.shape, 1), bool)}


IMAGES = {"unified": _in_sequence, "cross_attention": _in_tiles, "encoder_decoder": _in_memory}
