"""Process start-up (settings of the allocator), memory trimming and hard exit."""

import ctypes
import os
import sys

# Huge pages, and no memory returned to the system before 8 GiB are unused.
ALLOCATOR = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_max=0",
        f"glibc.malloc.trim_threshold={8 * 2**30}",
    )
)


def prepare_process() -> None:
    """Restarts the program with `ALLOCATOR`, unless the environment chooses pages (Linux).

    XLA:CPU allocates its memory anew in every step, 250,000 pages of 4 KiB for a small model.
    glibc would map these from the system each time, and clearing them takes a good part of the
    step. glibc reads its settings only when a process starts.
    """
    settings = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or "glibc.malloc.hugetlb" in settings:
        return
    os.environ["GLIBC_TUNABLES"] = f"{settings}:{ALLOCATOR}".strip(":")
    # `orig_argv` has -m and the options of Python, too.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def trim_memory() -> None:
    """Returns the memory that glibc holds for reuse to the system (Linux).

    Small freed pieces stay with the process: after compiling a step of 39 M parameters XLA leaves
    about 400 MB, and the step then allocates its own memory on top.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def exit_now(code: int) -> None:
    """Ends this process at once.

    A normal exit waits for other processes, which may wait for this one, and minutes for the
    threads of a checkpoint that can never be completed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
