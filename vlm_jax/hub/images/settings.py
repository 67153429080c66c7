"""Image preprocessing settings of a checkpoint, and names of processor classes."""

from collections.abc import Mapping
from dataclasses import dataclass

OPEN_CLIP = "open_clip_config.json"


@dataclass(frozen=True)
class ImageSettings:
    """The keys of `preprocessor_config.json` that affect pixel values, under their own names.

    Pairs are (height, width) in pixels.
    """

    kind: str  # one of `DEFAULTS`, or `OPEN_CLIP`
    #: of the resize, px; its keys are one of `SIZE_KEYS`. Qwen2-VL: least and most px of an image
    size: Mapping[str, int]
    resample: int  # one of Pillow's `Resampling`
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    do_convert_rgb: bool = False  # transparent pixels become white
    do_resize: bool = True
    do_center_crop: bool = False
    crop_size: tuple[int, int] | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    do_pad: bool = False
    pad_size: tuple[int, int] | None = None  # None: the largest image of the batch
    padding_value: float = 0.0  # Fuyu; 0..255
    padding_mode: str = "constant"
    patch_size: tuple[int, int] = (30, 30)  # Fuyu, Qwen2-VL, Pixtral, SigLIP 2
    max_num_patches: int = 256  # SigLIP 2
    temporal_patch_size: int = 2  # Qwen2-VL: frames of a patch
    #: Qwen2-VL, Pixtral: side of the squares of patches that become a token
    merge_size: int = 2
    max_image_tiles: int = 4  # mllama
    do_image_splitting: bool = True  # Idefics3
    max_image_size: Mapping[str, int] | None = None  # Idefics3: longest_edge of a tile, px
    min_patches: int = 1  # InternVL: number of tiles
    max_patches: int = 12
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()  # LLaVA-NeXT: sizes in whole tiles

    @property
    def tile_px(self) -> int:
        """LLaVA-NeXT: side of a tile, before the resize."""
        return self.crop_size[0] if self.crop_size else next(iter(self.size.values()))

    @property
    def pads_to_square(self) -> bool:
        """LLaVA's meaning of `do_pad`: before the resize, with the mean color."""
        return self.do_pad and self.kind == "LlavaImageProcessor"

    @property
    def resizes_before_rounding(self) -> bool:
        """DINOv3: pixels keep the fractions that the resize gives them."""
        return self.kind == "DINOv3ViTImageProcessor"

    @property
    def rgb_conversion(self) -> str:
        """Value of `Vision.rgb_conversion` for files.

        `transformers.image_utils.load_image` converts every file, before do_convert_rgb.
        """
        return "convert_composite" if self.do_convert_rgb else "convert"


QWEN2_VL = "Qwen2VLImageProcessor"
PIXTRAL = "PixtralImageProcessor"
IDEFICS3 = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
LLAVA_ONEVISION = "LlavaOnevisionImageProcessor"
LLAVA_NEXT = ("LlavaNextImageProcessor", LLAVA_ONEVISION)

SQUARE = ("height", "width")
