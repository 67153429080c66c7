"""Tar shards of webdataset: members with one key are a sample, "7.jpg" and "7.json" for instance.

A key is a member's path up to the first dot of its name, and its members follow one another.
Source: https://github.com/webdataset/webdataset, `group_by_keys`.
"""

import itertools
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from vlm_jax.config import DataError
from vlm_jax.data.forms.layouts import FILE_KEYS, IMAGE_KEYS
from vlm_jax.data.forms.record import BadRecord, describe

IMAGES = ("jpg", "jpeg", "png", "webp")
PATH_KEYS = (*IMAGE_KEYS, *FILE_KEYS)
SUFFIXES = (".tar", ".tar.gz", ".tgz")


def recognize(path: Path, head: bytes) -> bool:
    """Returns whether a file has the signature of a tar file at byte 257, or its suffix."""
    return head[257:262] == b"ustar" or path.name.lower().endswith(SUFFIXES)


def read(path: Path) -> Iterator[tuple[str, dict | BadRecord]]:
    """Yields the location of each sample, and its record with the images' contents.

    Raises:
      DataError: the file is damaged or has no samples.
    """
    count = 0
    try:
        with tarfile.open(path, "r|*") as shard:
            for key, members in itertools.groupby(_members(shard), key=lambda member: member[0]):
                yield f"sample {key!r}", _record(key, members)
                count += 1
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise DataError(f"{path} is not a readable tar file: {error}.") from None
    if not count:
        raise DataError(f"{path} has no files: it has no conversations.")


def _members(shard: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """Yields key, extension and content of the files of a shard."""
    for member in shard:
        folder, slash, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        # No key: metadata of macOS, such as "._7.jpg".
        if member.isfile() and key:
            yield f"{folder}{slash}{key}", extension.lower(), shard.extractfile(member).read()


def _record(key: str, members: Iterator[tuple[str, str, bytes]]) -> dict | BadRecord:
    """Returns the JSON of a sample, or a caption from its text, with the images' contents."""
    images: list[bytes] = []
    record, caption = {}, {}
    # The tar file is a stream: all members of the sample are read, also after a fault.
    fault = None
    for _, extension, content in members:
        try:
            # Several images of a sample are "7.0.jpg", "7.1.jpg".
            if extension.rpartition(".")[2] in IMAGES:
                images.append(content)
            elif extension == "txt":
                caption = {"caption": content.decode("utf-8-sig").strip()}
            elif extension == "json":
                record = _parse_object(content)
            else:
                raise BadRecord(
                    f"has a file .{extension}: only {', '.join(IMAGES)}, json and txt are read"
                )
        except UnicodeDecodeError:
            fault = BadRecord(f"has a .{extension} that is not text in UTF-8")
        except BadRecord as error:
            fault = error
    if fault:
        return fault
    record = {"id": key} | caption | record
    # The images of the shard replace the paths that the record had as files.
    if images:
        others = {key: value for key, value in record.items() if key not in PATH_KEYS}
        record = others | {"images": images}
    return record


def _parse_object(content: bytes) -> dict:
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise BadRecord(f"has a .json that is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadRecord(f"has {describe(value)} in its .json, not an object")
    return value
