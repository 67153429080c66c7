"""Values that the image processor classes of transformers have for missing keys."""

from PIL import Image

from vlm_jax.hub.images.settings import IDEFICS3, LLAVA_ONEVISION, PIXTRAL, QWEN2_VL

BILINEAR = Image.Resampling.BILINEAR
BICUBIC = Image.Resampling.BICUBIC
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_SQUARE = {"size": {"height": 224, "width": 224}, "resample": BILINEAR}
_CLIP = {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": BICUBIC,
    "do_convert_rgb": True,
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
_IDEFICS3 = {
    "size": {"longest_edge": 4 * 364},
    "resample": Image.Resampling.LANCZOS,
    "do_convert_rgb": True,
    "max_image_size": {"longest_edge": 364},
}
SIDES_PX = range(384, 2305, 384)  # LLaVA-OneVision

# Image processor class -> values of missing and null keys
# (transformers 5.23, `models/*/image_processing_*`).
DEFAULTS = {
    "CLIPImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "SiglipImageProcessor": _SQUARE
    | {"resample": BICUBIC, "do_convert_rgb": True, "default_to_square": False},
    # An image has the size of its patches.
    "Siglip2ImageProcessor": _SQUARE | {"patch_size": 16},
    "ViTImageProcessor": _SQUARE,
    "DeiTImageProcessor": {
        "size": 256,
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": 224,
    },
    "DINOv3ViTImageProcessor": _SQUARE
    | {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)},
    "FuyuImageProcessor": _SQUARE
    | {"size": {"height": 1080, "width": 1920}, "do_pad": True, "padding_value": 1.0},
    "MllamaImageProcessor": _SQUARE | {"do_convert_rgb": True, "do_pad": True},
    "Gemma3ImageProcessor": _SQUARE | {"do_convert_rgb": True},
    "IdeficsImageProcessor": _SQUARE
    | {"resample": BICUBIC, "do_convert_rgb": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "BlipImageProcessor": _SQUARE
    | {
        "size": {"height": 384, "width": 384},
        "resample": BICUBIC,
        "do_convert_rgb": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
    **dict.fromkeys(IDEFICS3, _IDEFICS3),
    "LlavaNextImageProcessor": _CLIP
    | {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]},
    LLAVA_ONEVISION: {
        "size": {"height": 384, "width": 384},
        "resample": BICUBIC,
        "do_convert_rgb": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_grid_pinpoints": [[height, width] for height in SIDES_PX for width in SIDES_PX],
    },
    "GotOcr2ImageProcessor": {
        "size": {"height": 384, "width": 384},
        "resample": BICUBIC,
        "do_convert_rgb": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
    QWEN2_VL: {
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "resample": BICUBIC,
        "do_convert_rgb": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "patch_size": 14,
    },
    PIXTRAL: {
        "size": {"longest_edge": 1024},
        "resample": BICUBIC,
        "do_convert_rgb": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "patch_size": 16,
        "merge_size": 1,
    },
}

# `model_type` of config.json -> image processor class, if the file names none.
CLASS_OF_MODEL_TYPE = {
    "bit": "BitImageProcessor",
    "blip-2": "BlipImageProcessor",
    "clip": "CLIPImageProcessor",
    "deit": "DeiTImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov3_vit": "DINOv3ViTImageProcessor",
    "fuyu": "FuyuImageProcessor",
    "gemma3": "Gemma3ImageProcessor",
    "idefics": "IdeficsImageProcessor",
    "idefics3": "Idefics3ImageProcessor",
    "internvl": "GotOcr2ImageProcessor",
    "llava": "LlavaImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "llava_onevision": LLAVA_ONEVISION,
    "mistral3": PIXTRAL,
    "mllama": "MllamaImageProcessor",
    "paligemma": "SiglipImageProcessor",
    "qwen2_5_vl": QWEN2_VL,
    "qwen2_vl": QWEN2_VL,
    "qwen3_vl": QWEN2_VL,
    "siglip": "SiglipImageProcessor",
    "siglip2": "Siglip2ImageProcessor",
    "smolvlm": "SmolVLMImageProcessor",
    "trocr": "ViTImageProcessor",
    "vit": "ViTImageProcessor",
}
