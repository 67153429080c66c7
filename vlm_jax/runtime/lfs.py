"""Git LFS pointers: small text files that a clone without Git LFS has instead of large ones."""

import os

from vlm_jax.config import UserError

POINTER = b"version https://git-lfs"


def refuse_pointer(path: str | os.PathLike, data: bytes) -> None:
    """Raises UserError if `data`, the first bytes of a file, is a Git LFS pointer.

    Format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    """
    if data[: len(POINTER)] == POINTER:
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`."
        )
