"""Images of requests: data URLs, and http URLs if they are allowed."""

import base64
import binascii
import urllib.request
from collections.abc import Callable

from PIL import Image

from vlm_jax.data import images as image_files
from vlm_jax.serve.limits import ApiError, Limits

DOWNLOAD_SECONDS = 10

# URL, name of the part in messages -> image
ImageReader = Callable[[object, str], Image.Image]


def image_reader(limits: Limits, allows_http: bool = False) -> ImageReader:
    """Returns a function that reads the image of an `image_url` part.

    It raises ApiError for a URL that is refused or an image beyond the limits, and DataError for
    bytes that are not an image.
    """

    def read(url: object, name: str) -> Image.Image:
        if not isinstance(url, str):
            raise ApiError(f"{name}.image_url.url is missing.", param=name)
        if url.startswith("data:"):
            encoded = _decode_data_url(url, name, limits)
        elif url.startswith(("http://", "https://")) and allows_http:
            encoded = _download(url, name, limits)
        else:
            raise ApiError(
                f"{name}: the server takes images as data URLs (data:image/png;base64,...).",
                param=name,
            )
        return decode_image(encoded, name, limits)

    return read


def decode_image(encoded: bytes, name: str, limits: Limits) -> Image.Image:
    """Decodes an image file within the limits.

    Raises:
      ApiError: the image is beyond the limits.
      DataError: the bytes are not an image.
    """
    if len(encoded) > limits.max_image_bytes:
        raise ApiError(
            f"{name}: the image has more than {limits.max_image_bytes} bytes.", param=name
        )
    # The header has the size, so that a decompression bomb is not decoded.
    width, height = image_files.upright_size(encoded, name)
    if width * height > limits.max_image_px:
        raise ApiError(
            f"{name}: the image has {width} x {height} px, more than {limits.max_image_px} "
            "pixels: scale it down.",
            param=name,
        )
    return image_files.upright(encoded, name)


def _decode_data_url(url: str, name: str, limits: Limits) -> bytes:
    header, comma, content = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ApiError(f"{name}: the data URL must be data:image/...;base64,...", param=name)
    # 4 characters hold 3 bytes.
    if len(content) > limits.max_image_bytes * 4 // 3 + 4:
        raise ApiError(
            f"{name}: the image has more than {limits.max_image_bytes} bytes.", param=name
        )
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(f"{name}: the data URL is not base64.", param=name) from None


def _download(url: str, name: str, limits: Limits) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as response:
            return response.read(limits.max_image_bytes + 1)
    except (OSError, ValueError) as error:
        raise ApiError(f"{name}: cannot download the image: {error}.", param=name) from None
