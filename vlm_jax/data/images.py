"""Image files -> pixels of the size and range that the encoder reads."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vlm_jax.config import ConfigError, Vision

ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 are turned by a quarter

# What Pillow raises for bytes that are no image, or only the first part of one.
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def read_image(path: str | os.PathLike) -> Image.Image:
    """The image in a file, upright and RGB. ConfigError names the file where there is none."""
    return decode(read_bytes(path), name=str(path))


def from_array(pixels: np.ndarray) -> Image.Image:
    """(height, width), or (height, width, 1, 3 or 4) uint8 -> an open image. ConfigError for any other array."""
    channels = pixels.shape[2:] or (1,)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or not pixels.size or channels[0] not in (1, 3, 4):
        raise ConfigError(
            f"an image array is {pixels.dtype} of shape {pixels.shape}: it must be uint8 of shape (height, width), or "
            "(height, width, channels) with 1, 3 or 4 channels."
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def read_bytes(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the image {path}: {error.strerror}.") from None


def upright(encoded: bytes, name: str = "image", needed_px: int = 0) -> Image.Image:
    """The bytes of an image file -> the image as it was seen, in its own mode. ConfigError where there is none."""
    try:
        image = Image.open(io.BytesIO(encoded))
        if needed_px:
            image.draft(None, (2 * needed_px, 2 * needed_px))
        image.load()
        return ImageOps.exif_transpose(image)
    except BROKEN as error:
        raise unreadable(name, error) from None


def decode(encoded: bytes, name: str = "image", needed_px: int = 0) -> Image.Image:
    """The bytes of an image file -> upright RGB; what is transparent becomes white.

    A JPEG of which only `needed_px` rows and columns are needed (0: all) is decoded in an eighth, a quarter or half of
    its size, as long as that leaves twice as many: several times faster, and hardly another image when it is resized.
    """
    return to_rgb(upright(encoded, name, needed_px))


def to_rgb(image: Image.Image) -> Image.Image:
    """An open image -> RGB; what is transparent becomes white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would clip at 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def upright_size(encoded: bytes, name: str = "image") -> tuple[int, int]:
    """The width and height of `upright`, of which only the first bytes of the file are decoded."""
    try:
        image = Image.open(io.BytesIO(encoded))
        is_turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    except BROKEN as error:
        raise unreadable(name, error) from None
    return image.size[::-1] if is_turned else image.size


def unreadable(name: str, error: Exception) -> ConfigError:
    return ConfigError(f"{name} is not a readable image, or is cut short ({type(error).__name__}).")


def fit(
    image: Image.Image, image_size_px: int, layout: tuple[int, int] = (1, 1), resample: str = "bicubic"
) -> np.ndarray:
    """Any image -> (rows * image_size_px, columns * image_size_px, 3) uint8, its sides scaled apart where they differ.

    By default a square; `layout` is the rows and columns of squares.
    """
    rows, columns = layout
    size = (columns * image_size_px, rows * image_size_px)
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling[resample.upper()]))


def normalise(pixels: np.ndarray, vision: Vision) -> np.ndarray:
    """uint8 0..255 -> float32, 0..1 less the mean of every channel over its deviation; by default -1..1."""
    mean, deviation = np.array(vision.image_mean), np.array(vision.image_std)
    return pixels.astype(np.float32) * np.float32(1 / (255 * deviation)) - np.float32(mean / deviation)


def augment(pixels: np.ndarray, kinds: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) -> (H, W, 3) with its pixels moved by each of the `AUGMENTATIONS` named in `kinds`, in turn."""
    for kind in kinds:
        pixels = AUGMENTATIONS[kind](pixels, rng)
    return pixels


def _mirror(pixels, rng):
    return pixels[:, ::-1] if rng.integers(2) else pixels


def _turn(pixels, rng):
    return np.rot90(pixels, rng.integers(4))


def _shift(pixels, rng):
    """Moves what is on a plain background; only blank lines leave at one side and come back at the other."""
    blank = (pixels == pixels[0, 0]).all(axis=-1)
    for axis in (0, 1):
        lines = np.append(blank.all(axis=1 - axis), False)
        before, after = lines.argmin(), lines[-2::-1].argmin()
        pixels = np.roll(pixels, rng.integers(-before, after + 1), axis)
    return pixels


AUGMENTATIONS = {"mirror": _mirror, "turn": _turn, "shift": _shift}
