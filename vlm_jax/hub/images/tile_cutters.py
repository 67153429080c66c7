"""Image processors that cut an image into square tiles, each an image of its own to the encoder.

References: transformers 5.23, `models/idefics3/image_processing_pil_idefics3.py` (SmolVLM's is the
same), `models/got_ocr2/image_processing_pil_got_ocr2.py` (InternVL) and
`models/llava_onevision/image_processing_pil_llava_onevision.py` (LLaVA-NeXT's is the same for one
image).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image

from vlm_jax.config.tile_maps import choose_grid, fitted_shape
from vlm_jax.data.resize import center_crop, pad_to_square, resize
from vlm_jax.data.tiling import nearest_layout
from vlm_jax.hub.images import steps
from vlm_jax.hub.images.settings import LLAVA_ONEVISION, SQUARE, ImageSettings

MAX_SIDE_PX = 4096  # of Idefics3's images before they are cut


class Tiles(NamedTuple):
    """Squares cut from one image, row by row; then the whole image, if there are several tiles.

    LLaVA-NeXT has the whole image first, and with one tile or none, too.
    """

    images: list[Image.Image]
    grid: tuple[int, int]  # rows and columns of tiles


def cut_idefics3(image: Image.Image, settings: ImageSettings) -> Tiles:
    """Resizes an RGB image to whole tiles, nearly in its aspect ratio, and cuts it."""
    tile_px = settings.max_image_size["longest_edge"]
    square = (tile_px, tile_px)
    if settings.do_resize:
        image = resize(image, resized_shape(image, settings), settings.resample)
    if not settings.do_image_splitting:
        return Tiles([resize(image, square, settings.resample)], (1, 1))
    image = resize(image, _whole_tiles(image.height, image.width, tile_px), settings.resample)
    return _cut(image, tile_px, lambda: resize(image, square, settings.resample))


def cut_got_ocr2(image: Image.Image, settings: ImageSettings) -> Tiles:
    """Squashes an RGB image onto the grid of tiles with the nearest aspect ratio, and cuts it.

    InternVLProcessor cuts images whatever `crop_to_patches` of the image processor is.
    """
    tile_px = settings.size["height"]
    rows, columns = nearest_layout(
        image.width, image.height, settings.min_patches, settings.max_patches, tile_px
    )
    canvas = resize(image, (rows * tile_px, columns * tile_px), settings.resample)
    return _cut(canvas, tile_px, lambda: resize(image, (tile_px, tile_px), settings.resample))


def cut_llava_next(image: Image.Image, settings: ImageSettings) -> Tiles:
    """Fits an RGB image onto the grid that keeps most of its pixels, with black borders."""
    side = settings.tile_px
    grids = [(height // side, width // side) for height, width in settings.image_grid_pinpoints]
    size = image.height, image.width
    rows, columns = choose_grid(size, grids, side)
    fitted = resize(image, fitted_shape(size, (rows * side, columns * side)), settings.resample)
    canvas = Image.new("RGB", (columns * side, rows * side))
    canvas.paste(fitted, ((canvas.width - fitted.width) // 2, (canvas.height - fitted.height) // 2))
    edge = next(iter(settings.size.values()))
    views = [resize(image, (edge, edge), settings.resample), *_cut_canvas(canvas, side)]
    return Tiles([_finish(view, settings) for view in views], (rows, columns))


def pad_llava_onevision(image: Image.Image, settings: ImageSettings) -> Tiles:
    """Pads an RGB image to one square of the mean color: one of several in a prompt."""
    color = tuple(int(mean * 255) for mean in settings.image_mean)
    return Tiles([_finish(pad_to_square(image, color), settings)], (0, 0))


def _finish(view: Image.Image, settings: ImageSettings) -> Image.Image:
    view = resize(view, steps.resized_shape(*view.size, settings.size), settings.resample)
    return center_crop(view, settings.crop_size) if settings.do_center_crop else view


Cutter = Callable[[Image.Image, ImageSettings], Tiles]
TILE_CUTTERS: dict[str, Cutter] = {
    "Idefics3ImageProcessor": cut_idefics3,
    "SmolVLMImageProcessor": cut_idefics3,
    "GotOcr2ImageProcessor": cut_got_ocr2,
    "LlavaNextImageProcessor": cut_llava_next,
    LLAVA_ONEVISION: cut_llava_next,
}
# Instead of it, for an image that is not alone in its prompt.
CUTTERS_OF_SEVERAL: dict[str, Cutter] = {LLAVA_ONEVISION: pad_llava_onevision}


def resized_shape(image: Image.Image, settings: ImageSettings) -> tuple[int, int]:
    """(height, width) of Idefics3's first resize: the longer side becomes `longest_edge`."""
    if tuple(settings.size) == SQUARE:
        return settings.size["height"], settings.size["width"]
    height, width = _scaled(image.height, image.width, settings.size["longest_edge"])
    if image.width >= image.height:
        height += height % 2
    else:
        width += width % 2
    if max(height, width) > MAX_SIDE_PX:
        return _scaled(height, width, MAX_SIDE_PX)
    return height, width


def _scaled(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """Returns the (height, width) whose longer side is `longest_edge`, rounded down."""
    aspect = width / height
    if width >= height:
        return int(longest_edge / aspect), longest_edge
    return longest_edge, int(longest_edge * aspect)


def _whole_tiles(height: int, width: int, tile_px: int) -> tuple[int, int]:
    """(height, width) in whole tiles: the longer side is rounded up, and the other follows it."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile_px) * tile_px
        height = math.ceil(int(width / aspect) / tile_px) * tile_px
    else:
        height = math.ceil(height / tile_px) * tile_px
        width = math.ceil(int(height * aspect) / tile_px) * tile_px
    return height, width


def _cut(canvas: Image.Image, tile_px: int, whole: Callable[[], Image.Image]) -> Tiles:
    tiles = _cut_canvas(canvas, tile_px)
    grid = canvas.height // tile_px, canvas.width // tile_px
    return Tiles(tiles if len(tiles) == 1 else [*tiles, whole()], grid)


def _cut_canvas(canvas: Image.Image, tile_px: int) -> list[Image.Image]:
    tiles = []
    for top in range(0, canvas.height, tile_px):
        for left in range(0, canvas.width, tile_px):
            tiles.append(canvas.crop((left, top, left + tile_px, top + tile_px)))
    return tiles
