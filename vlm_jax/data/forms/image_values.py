"""Images of a record: a path, a file:// URL, a base64 data URL, or the content of a file."""

import base64
import binascii
import re
import urllib.parse
from pathlib import Path

from vlm_jax.data.forms.record import BadRecord, check_text

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
DATA_URL = re.compile(r"data:image/[A-Za-z0-9.+-]+;base64,", re.IGNORECASE)


def read_images(value: object, name: str) -> list[str | bytes]:
    """Returns the images of a value that is an image, a list of images, or None."""
    values = value if isinstance(value, list) else [value]
    return [read_image(item, name) for item in values if not _is_null(item)]


def _is_null(value: object) -> bool:
    """Returns whether an image is missing; some Parquet files have a struct of nulls then."""
    if isinstance(value, dict):
        return bool(value) and all(item is None for item in value.values())
    return value in (None, "")


def read_image(value: object, name: str) -> str | bytes:
    """Returns the path of an image file, or its content; `name` is the value's in messages.

    A struct of Hugging Face's datasets has the content in 'bytes' or else a path in 'path'.
    """
    if isinstance(value, dict):
        content = value.get("bytes")
        value = value.get("path") if content is None else content
        if value is None:
            raise BadRecord(f"has an object without 'bytes' and 'path' as {name}")
    if isinstance(value, bytes):
        return value
    text = check_text(value, name)
    if text.lower().startswith("data:"):
        return _decode_data_url(text, name)
    if "\0" in text:
        raise BadRecord(f"has a NUL character in {name}, which no path has")
    url = URL.match(text)
    if url is None:
        return Path(text).as_posix()
    parts = urllib.parse.urlsplit(text)
    if url[1].lower() != "file" or parts.netloc not in ("", "localhost"):
        raise BadRecord(
            f"has the URL {text[:80]!r} as {name}: only paths, file:// URLs and base64 data URLs "
            "are read"
        )
    return urllib.parse.unquote(parts.path)


def _decode_data_url(text: str, name: str) -> bytes:
    header = DATA_URL.match(text)
    if header is None:
        raise BadRecord(
            f"has a data URL as {name} that does not begin with data:image/TYPE;base64,"
        )
    try:
        return base64.b64decode(text[header.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord(f"has a data URL as {name} that is not base64 ({error})") from None


def read_part(part: dict, name: str) -> str | bytes | None:
    """Returns the image of a part of an OpenAI message; None if it is among the record's images."""
    for key in ("image_url", "image", "path", "url", "bytes"):
        value = part.get(key)
        if key == "image_url" and isinstance(value, dict):
            value = value.get("url")
        if value not in (None, ""):
            return read_image(value, f"{key!r} of {name}")
    return None
