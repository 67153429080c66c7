"""Image preprocessing of the data pipeline, from and for processors of transformers."""

from typing import Any

from PIL import Image

from vlm_jax.config import Vision
from vlm_jax.hub.images.settings import IDEFICS3, LLAVA_NEXT, QWEN2_VL, SQUARE, ImageSettings


def vision_settings(settings: ImageSettings, vision: Vision) -> dict[str, object]:
    """Fields of `Vision` for the pixels of a processor; `vision` has the size."""
    resize, resize_px = _resize(settings, vision)
    budget = {}
    if settings.kind == QWEN2_VL:
        # Published processors allow images that no row of training has room for.
        budget["max_patches"] = min(max_patches(settings), vision.max_patches)
    return budget | {
        "image_mean": tuple(settings.image_mean),
        "image_std": tuple(settings.image_std),
        "resample": Image.Resampling(settings.resample).name.lower(),
        "resize": resize,
        "resize_px": resize_px,
        "rgb_conversion": settings.rgb_conversion,
    }


def max_patches(settings: ImageSettings) -> int:
    """Returns the maximum number of patches of an image of Qwen2-VL."""
    return settings.size["longest_edge"] // settings.patch_size[0] ** 2


def _resize(settings: ImageSettings, vision: Vision) -> tuple[str, int | None]:
    """Values of `Vision.resize` and `resize_px` for a processor."""
    if vision.tile_layouts or vision.tile_grids or settings.pads_to_square:
        return "pad", None
    if not settings.do_center_crop or tuple(settings.size) == SQUARE:
        return "squash", None
    edge = settings.size.get("shortest_edge")
    crop = (settings.crop_size or (edge,))[0]
    if edge is None or edge == crop:
        return "crop", None
    return "crop", round(edge * vision.image_size_px / crop)


def processor_config(vision: Vision) -> dict[str, Any]:
    """preprocessor_config.json of transformers for the images of the data pipeline."""
    side = vision.image_size_px
    square = {"height": side, "width": side}
    config: dict[str, Any] = {
        "do_convert_rgb": vision.rgb_conversion != "convert",
        "do_resize": True,
        "size": square,
        "resample": int(Image.Resampling[vision.resample.upper()]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }
    if vision.is_native:
        patch, unit = vision.patch_size_px, vision.square_px
        return config | {
            "image_processor_type": QWEN2_VL,
            "size": {"shortest_edge": unit**2, "longest_edge": vision.max_squares * unit**2},
            "patch_size": patch,
            "temporal_patch_size": vision.patch_frames,
            "merge_size": vision.patch_square,
        }
    if vision.keeps_aspect_in_tiles:
        config |= {
            "image_processor_type": "MllamaImageProcessor",
            "do_pad": True,
            "max_image_tiles": vision.tiles,
        }
    elif vision.resize == "squash":
        config |= {"image_processor_type": "ViTImageProcessor"}
    else:
        config |= {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": vision.shortest_edge_px},
            "do_center_crop": True,
            "crop_size": square,
        }
    if vision.resize == "pad" and not vision.keeps_aspect_in_tiles:
        config |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return config


def tile_settings(kind: str, vision: Vision) -> dict[str, Any]:
    """Keys with which a processor class cuts images as training does: most make one square."""
    if kind in LLAVA_NEXT:
        side = vision.image_size_px
        pinpoints = [[rows * side, columns * side] for rows, columns in vision.tile_grids]
        return {"image_grid_pinpoints": pinpoints}
    if kind in IDEFICS3:
        side = vision.image_size_px
        return {"do_image_splitting": False, "max_image_size": {"longest_edge": side}}
    if kind == "IdeficsImageProcessor":
        return {"image_size": vision.image_size_px}
    return {"max_patches": 1} if kind == "GotOcr2ImageProcessor" else {}
