"""Reads text files in UTF-8."""

import codecs
from pathlib import Path

from vlm_jax.config import DataError

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Around records. Concatenated files have byte order marks between them.
BLANK = "\ufeff \t\r\n"


def read_text(path: Path) -> str:
    """Returns the text of a file.

    Raises:
      DataError: the file is not text in UTF-8, or is empty.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        if b"\0" in content and not content.startswith(UTF_16):
            raise DataError(f"{path} is not a text file: it may be compressed.") from None
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not text in UTF-8: line {line} has the byte 0x{content[error.start]:02x}. "
            "Save the file as UTF-8."
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path} is not text: line {line} has a NUL byte. The file may be damaged.")
    if not text.strip(BLANK):
        raise DataError(f"{path} is empty: it has no conversations.")
    return text
