"""What a picture goes through on its way to a model: a function a step, in Pillow until its numbers leave 0..255."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from vlm_jax.config import ConfigError
from vlm_jax.data.images import from_array, read_bytes, upright
from vlm_jax.data.resize import shortest_edge_shape
from vlm_jax.hub.images.settings import ImageSettings

ImageInput = (
    Image.Image | np.ndarray | str | os.PathLike
)  # an open image or its pixels, taken as they are, or a file
ImageInputs = ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]] | None


def is_picture(value) -> bool:
    return isinstance(value, Image.Image | str | os.PathLike) or hasattr(value, "__array__")


def to_rows(
    images: ImageInputs, prompts: Sequence[str], image_token: str = ""
) -> list[list[ImageInput]]:
    """Images of each prompt, from any nesting that the processors of transformers accept.

    Args:
      images: one list for each prompt; or a flat list, of which each prompt takes one image for each of its image
        tokens, or one where no prompt has any; or a single image. A single prompt takes all images of a flat list.
      image_token: text of the placeholder; "" if the family has none.

    Raises:
      ConfigError: the images cannot be divided among the prompts.
    """
    images = [images] if is_picture(images) else () if images is None else images
    if not isinstance(images, list | tuple):
        raise ConfigError(
            f"images is of the type {type(images).__name__}: give one list of images for each prompt."
        )
    if not images:
        return [[] for _ in prompts]
    if all(map(is_picture, images)):
        return _divide(images, prompts, image_token)
    rows = [[row] if is_picture(row) else row for row in images]
    wrong = [row for row in rows if not isinstance(row, list | tuple)]
    if wrong:
        raise ConfigError(
            f"images holds {wrong[0]!r}: give one list of images for each prompt, [] where it has none."
        )
    if len(rows) != len(prompts):
        raise ConfigError(
            f"images has {len(rows)} lists for {len(prompts)} prompts: give one list of images for each prompt, [] "
            "where it has none."
        )
    return [list(row) for row in rows]


def _divide(
    images: Sequence[ImageInput], prompts: Sequence[str], image_token: str
) -> list[list[ImageInput]]:
    """A flat list of images -> those of each prompt."""
    counts = [prompt.count(image_token) if image_token else 0 for prompt in prompts]
    if len(prompts) == 1:
        counts = [len(images)]
    elif not any(counts):
        counts = [1] * len(prompts)
    if sum(counts) != len(images):
        raise ConfigError(
            f"a flat list of {len(images)} images does not match {len(prompts)} prompts that need {sum(counts)}: give "
            "one list of images for each prompt, [] where it has none."
        )
    following = iter(images)
    return [list(itertools.islice(following, count)) for count in counts]


def read(picture: ImageInput) -> Image.Image:
    """An open image as it is; the one in a file upright. ConfigError names a file or an array that holds none."""
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, str | os.PathLike):
        return upright(read_bytes(picture), str(picture))
    if not is_picture(picture):
        kind = type(picture).__name__
        raise ConfigError(
            f"{kind} is not a kind of image: give a file, an open PIL image or an array of pixels."
        )
    return from_array(np.asarray(picture))


def to_rgb(picture: ImageInput, whiten: bool) -> Image.Image:
    """Any picture -> RGB; `whiten`: what is transparent becomes white.

    A file loses its transparency before, as in `transformers.image_utils.load_image`. Processors that do not whiten
    refuse open images of other modes than RGB; here those are whitened.
    """
    image = read(picture)
    if image is not picture:
        image = image.convert("RGB")
    if not whiten and image.mode == "RGB":
        return image
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resized_shape(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """The (height, width) that an image gets from `ImageSettings.size`; fractions of a pixel are dropped."""
    match size:
        case {"height": new_height, "width": new_width}:
            return new_height, new_width
        case {"max_height": most_rows, "max_width": most_columns}:
            scale = min(most_rows / height, most_columns / width)
            return int(height * scale), int(width * scale)
    short, long = min(height, width), max(height, width)
    edge = size["shortest_edge"]
    if long / short * edge > size.get("longest_edge", math.inf):
        exact = size["longest_edge"] * short / long
        new_short, new_long = round(exact), int(exact * long / short)
        if new_short == short:
            return height, width
        return (new_short, new_long) if height <= width else (new_long, new_short)
    return shortest_edge_shape(height, width, edge)


def fitting_shape(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """As `resized_shape`, but only images that are too large change, until they fit."""
    if height <= size["height"] and width <= size["width"]:
        return height, width
    scale = min(size["height"] / height, size["width"] / width)
    return int(height * scale), int(width * scale)


def pad(
    pixels: np.ndarray, shape: tuple[int, int], mode: str = "constant", value: float = 0
) -> np.ndarray:
    """(height, width, 3) -> `shape`, more rows below and columns to the right."""
    rows, columns = (new - old for new, old in zip(shape, pixels.shape))
    if min(rows, columns) < 0:
        raise ConfigError(
            f"an image of {pixels.shape[0]} x {pixels.shape[1]} px cannot be padded to {shape}."
        )
    fill = {"constant_values": value} if mode == "constant" else {}
    return np.pad(pixels, ((0, rows), (0, columns), (0, 0)), mode, **fill)


def rescale(pixels: np.ndarray, factor: float) -> np.ndarray:
    return (pixels * np.float64(factor)).astype(np.float32)


def normalise(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    return (pixels - np.float32(mean)) / np.float32(std)


def to_values(pixels: Image.Image | np.ndarray, settings: ImageSettings) -> np.ndarray:
    """An image of 0..255 -> (height, width, 3) float32 as the model reads it."""
    pixels = np.asarray(pixels)
    pixels = (
        rescale(pixels, settings.rescale_factor)
        if settings.do_rescale
        else pixels.astype(np.float32)
    )
    return (
        normalise(pixels, settings.image_mean, settings.image_std)
        if settings.do_normalize
        else pixels
    )
