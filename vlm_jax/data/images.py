"""Image files -> pixels of the size and range that the encoder reads."""

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
PNG_TEXT_LIMITS = ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY")  # as Pillow names them in its errors

# Pillow warns about malformed metadata and about large images. The pixels are decoded all the same,
# and an image that cannot be decoded is an error.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(path: str | os.PathLike) -> Image.Image:
    """Returns the image in a file, upright and RGB. DataError names a file that cannot be read."""
    return decode(read_bytes(path), name=str(path))


def from_array(pixels: np.ndarray) -> Image.Image:
    """(height, width), or (height, width, 1, 3 or 4) uint8 -> an open image. DataError for any other array."""
    channels = pixels.shape[2:] or (1,)
    if (
        pixels.dtype != np.uint8
        or pixels.ndim not in (2, 3)
        or not pixels.size
        or channels[0] not in (1, 3, 4)
    ):
        raise DataError(
            f"an array of {pixels.dtype} {pixels.shape} is not an image: it must be uint8 of shape (height, width), or "
            "(height, width, channels) with 1, 3 or 4 channels."
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Returns the content of an image file. DataError names a file that cannot be read."""
    try:
        encoded = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the image {path}: {error.strerror}.") from None
    refuse_pointer(path, encoded)
    return encoded


@contextlib.contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises for malformed bytes into a DataError that names the image."""
    try:
        yield
    except Exception as error:  # of any type: a decoder meets arbitrary bytes
        raise _refusal(name, error) from None


def _refusal(name: str, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
    match error:
        case Image.DecompressionBombError():
            size = reason.partition(",")[0]  # both numbers of pixels
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
    """EXIF orientation, 1 to 8; 1 where EXIF has none, or is malformed.

    `ImageOps.exif_transpose` would also write all other entries anew, which fails for an entry whose
    value does not fit its tag.
    """
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # of any type: EXIF may hold arbitrary bytes
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _forget_exif(image: Image.Image) -> None:
    """Drops all EXIF entries of a TIFF but the orientation, which Pillow applies in `load`.

    `load` would also follow the pointers among them, and fail where those are malformed.
    """
    exif = image.getexif()
    for tag in set(exif) - {ORIENTATION}:
        del exif[tag]


def decode(encoded: bytes, name: str = "image", needed_px: int = 0) -> Image.Image:
    """Decodes an image file to upright RGB; transparent pixels become white.

    A JPEG of which only `needed_px` rows and columns are needed (0: all) is decoded in an eighth, a quarter or half of
    its size, as long as that leaves twice as many: several times faster, and hardly another image when it is resized.

    Raises:
      DataError: as `upright`.
    """
    image = upright(encoded, name, needed_px)
    with decoding(name):
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An open image -> RGB; what is transparent becomes white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray(
            (np.asarray(image) >> 8).astype(np.uint8)
        )  # Pillow would clip at 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check(encoded: bytes, name: str = "image") -> None:
    """Raises DataError as `decode` would; a JPEG is read to its end, but at an eighth of its size."""
    decode(encoded, name, needed_px=1)


def upright_size(encoded: bytes, name: str = "image") -> tuple[int, int]:
    """Width and height of `upright`, in px, from the header of the file alone where that tells them."""
    with decoding(name):
        image = Image.open(io.BytesIO(encoded))
    is_turned = (
        _orientation(image) >= 5 and image.format != "TIFF"
    )  # Pillow turns the size of a TIFF
    return image.size[::-1] if is_turned else image.size


def fit(
    image: Image.Image,
    image_size_px: int,
    layout: tuple[int, int] = (1, 1),
    resample: str = "bicubic",
) -> np.ndarray:
    """Any image -> (rows * image_size_px, columns * image_size_px, 3) uint8, its sides scaled apart where they differ.

    By default a square; `layout` is the rows and columns of squares.
    """
    rows, columns = layout
    size = (columns * image_size_px, rows * image_size_px)
    return np.asarray(
        image if image.size == size else image.resize(size, Image.Resampling[resample.upper()])
    )


def normalise(pixels: np.ndarray, vision: Vision) -> np.ndarray:
    """uint8 0..255 -> float32, 0..1 less the mean of every channel over its deviation; by default -1..1."""
    mean, deviation = np.array(vision.image_mean), np.array(vision.image_std)
    return pixels.astype(np.float32) * np.float32(1 / (255 * deviation)) - np.float32(
        mean / deviation
    )


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
