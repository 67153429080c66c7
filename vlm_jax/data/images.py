"""Decodes, resizes, normalizes and augments images."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlm_jax.config import DataError, Vision
from vlm_jax.runtime.lfs import refuse_pointer

ORIENTATION = 0x0112  # EXIF tag; 1 is upright, 5 to 8 swap width and height
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_TEXT_LIMITS = ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY")  # in Pillow's errors

# Pillow warns about malformed metadata and about large images. The pixels are decoded all the same,
# and an image that cannot be decoded is an error.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(path: str | os.PathLike) -> Image.Image:
    """Returns the image in a file, upright and RGB. DataError names a file that cannot be read."""
    return decode(read_bytes(path), name=str(path))


def from_array(pixels: np.ndarray) -> Image.Image:
    """Converts (height, width) or (height, width, channels) uint8 to an open image.

    Raises:
      DataError: another type or shape; channels must be 1, 3 or 4.
    """
    channels = pixels.shape[2:] or (1,)
    is_image = pixels.ndim in (2, 3) and channels[0] in (1, 3, 4)
    if pixels.dtype != np.uint8 or not is_image or not pixels.size:
        raise DataError(
            f"an array of {pixels.dtype} {pixels.shape} is not an image: it must be uint8 of shape "
            "(height, width), or (height, width, channels) with 1, 3 or 4 channels."
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Returns the content of an image file. DataError names a file that cannot be read."""
    try:
        encoded = Path(os.path.expanduser(path)).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the image {path}: {error.strerror}.") from None
    # A NUL character in the path.
    except ValueError as error:
        raise DataError(f"cannot read the image {str(path)!r}: {error}.") from None
    refuse_pointer(path, encoded)
    return encoded


@contextlib.contextmanager
def decoding(name: str) -> Iterator[None]:
    """Converts any error of Pillow for malformed bytes to a DataError that names the image."""
    try:
        yield
    except Exception as error:  # of any type: a decoder meets arbitrary bytes
        raise _data_error(name, error) from None


def _data_error(name: str, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
    match error:
        case Image.DecompressionBombError():
            size = reason.partition(",")[0]  # pixels of the image, and Pillow's limit
            return DataError(f"{name} is too large: {size}; scale it down.")
        case MemoryError():
            return DataError(f"{name} is too large for the memory of this machine; scale it down.")
        case UnidentifiedImageError():
            return DataError(
                f"{name} is not a readable image: its format is unknown, or its header is damaged."
            )
    if any(limit in reason for limit in PNG_TEXT_LIMITS):
        return DataError(
            f"{name} has metadata beyond a limit of Pillow ({reason}); save it without metadata."
        )
    return DataError(f"{name} is not a readable image: {reason}.")


def upright(encoded: bytes, name: str = "image", needed_px: int = 0) -> Image.Image:
    """Decodes an image file and applies its EXIF orientation; keeps the image's own mode.

    Args:
      encoded: the content of the file.
      name: the image in error messages.
      needed_px: as in `decode`.

    Raises:
      DataError: the file is not an image, is damaged, or is beyond a limit of Pillow.
    """
    with decoding(name):
        image = Image.open(io.BytesIO(encoded))
        if needed_px:
            image.draft(None, (2 * needed_px, 2 * needed_px))
        if image.format == "TIFF":
            _forget_exif(image)
        image.load()
        transposition = TRANSPOSITIONS.get(_orientation(image))
        return image if transposition is None else image.transpose(transposition)


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 if EXIF has none or is malformed.

    `ImageOps.exif_transpose` would also rewrite all other entries, which fails for an entry whose
    value does not fit its tag.
    """
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # of any type: EXIF may hold arbitrary bytes
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _forget_exif(image: Image.Image) -> None:
    """Drops all EXIF entries of a TIFF except the orientation, which Pillow applies in `load`.

    `load` would also follow the pointers among them, and fail if they are malformed.
    """
    exif = image.getexif()
    for tag in set(exif) - {ORIENTATION}:
        del exif[tag]


def decode(
    encoded: bytes, name: str = "image", needed_px: int = 0, rgb_conversion: str = "composite"
) -> Image.Image:
    """Decodes an image file to upright RGB.

    Args:
      encoded: the content of the file.
      name: the image in error messages.
      needed_px: rows and columns that are needed (0: all). A JPEG is decoded at an eighth, a
        quarter or half of its size as long as that leaves twice as many: several times faster,
        with nearly the same image after resizing.
      rgb_conversion: as in `to_rgb`.

    Raises:
      DataError: as `upright`.
    """
    image = upright(encoded, name, needed_px)
    with decoding(name):
        return to_rgb(image, rgb_conversion)


def to_rgb(image: Image.Image, rgb_conversion: str = "composite") -> Image.Image:
    """Converts an open image to RGB by one of the values of `Vision.rgb_conversion`.

    Raises:
      DataError: the values of a gray image have no known scale.
    """
    if rgb_conversion.startswith("convert"):
        rgb = image.convert("RGB")
        # Pillow keeps the transparent color of a palette or of a gray image in `info`.
        has_transparent_color = rgb.info.get("transparency") is not None
        if rgb_conversion == "convert_composite" and has_transparent_color:
            return composite_on_white(rgb)
        return rgb
    if image.mode[0] in "IF":
        image = _to_8_bits(image)
    return composite_on_white(image) if image.has_transparency_data else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Converts a gray image with values of 16 or 32 bits to 8 bits.

    Pillow would clip the values at 255, so that most of the image would be white.

    Raises:
      DataError: values of 32 bits have no known scale.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    has_16_bits = image.mode.startswith("I;16")
    if has_16_bits or (image.mode == "I" and low >= 0 and 255 < high <= 65535):
        return Image.fromarray((values.astype(np.int32) >> 8).astype(np.uint8))
    if low < 0 or high > 255 or (image.mode == "F" and not high > 1):
        raise DataError(
            f"a gray image has values of {low:g} to {high:g}, the scale of which is unknown: save "
            "it with 8 bits."
        )
    return image.convert("L")


def composite_on_white(image: Image.Image) -> Image.Image:
    """Converts an image with transparency to RGB on a white background."""
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(background, image).convert("RGB")


def check(encoded: bytes, name: str = "image") -> None:
    """Raises DataError if `decode` would; reads a JPEG to its end, at an eighth of its size."""
    decode(encoded, name, needed_px=1)


def upright_size(encoded: bytes, name: str = "image") -> tuple[int, int]:
    """Returns width and height of `upright`, in px, from the header of the file if possible."""
    with decoding(name):
        image = Image.open(io.BytesIO(encoded))
    # Pillow applies the orientation to the size of a TIFF itself.
    is_turned = _orientation(image) >= 5 and image.format != "TIFF"
    return image.size[::-1] if is_turned else image.size


def fit(
    image: Image.Image,
    image_size_px: int,
    layout: tuple[int, int] = (1, 1),
    resample: str = "bicubic",
) -> np.ndarray:
    """Resizes an image to a grid of squares, by default one; the aspect ratio may change.

    `layout` is the rows and columns of squares.

    Returns:
      (rows * image_size_px, columns * image_size_px, 3) uint8.
    """
    rows, columns = layout
    size = (columns * image_size_px, rows * image_size_px)
    if image.size != size:
        image = image.resize(size, Image.Resampling[resample.upper()])
    return np.asarray(image)


def normalize(pixels: np.ndarray, vision: Vision) -> np.ndarray:
    """Scales uint8 pixels to 0..1, then normalizes each channel by mean and standard deviation.

    The defaults of `vision` give -1..1.

    Returns:
      The pixels as float32, in the same shape.
    """
    mean, std = np.array(vision.image_mean), np.array(vision.image_std)
    scale, offset = np.float32(1 / (255 * std)), np.float32(mean / std)
    return pixels.astype(np.float32) * scale - offset


def augment(pixels: np.ndarray, kinds: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Applies the `AUGMENTATIONS` named in `kinds` in order; (H, W, 3) stays (H, W, 3)."""
    for kind in kinds:
        pixels = AUGMENTATIONS[kind](pixels, rng)
    return pixels


def _mirror(pixels, rng):
    return pixels[:, ::-1] if rng.integers(2) else pixels


def _rotate(pixels, rng):
    return np.rot90(pixels, rng.integers(4))


def _shift(pixels, rng):
    """Moves the content on a plain background; only blank lines wrap around."""
    blank = (pixels == pixels[0, 0]).all(axis=-1)
    for axis in (0, 1):
        lines = np.append(blank.all(axis=1 - axis), False)
        before, after = lines.argmin(), lines[-2::-1].argmin()
        pixels = np.roll(pixels, rng.integers(-before, after + 1), axis)
    return pixels


AUGMENTATIONS = {"mirror": _mirror, "turn": _rotate, "shift": _shift}
