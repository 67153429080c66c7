"""How a process begins and ends, and what it settles with its allocator."""

import ctypes
import os
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def prepare_process() -> None:
    """Starts the program again with glibc's allocator on huge pages, where it is not so yet (Linux).

    XLA:CPU takes fresh memory for every step, 250,000 pages of 4 KiB for a small model, and page faults
    take a good part of the step. The allocator reads this setting only when a process begins.
    """
    settings = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or "glibc.malloc.hugetlb" in settings:
        return
    os.environ["GLIBC_TUNABLES"] = f"{settings}:{HUGE_PAGES}".strip(":")
    os.execv(
        sys.executable, [sys.executable, *sys.orig_argv[1:]]
    )  # -m and options of Python included


def trim_memory() -> None:
    """Gives the memory that glibc keeps for later back to the system (Linux).

    Freed small pieces stay with the process: XLA's compiler leaves about 400 MB for a step of 39 M parameters, beside
    which the step then takes its own.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def exit_now(code: int) -> None:
    """Ends this process at once.

    An ordinary end waits for other processes, who may wait for this one, and minutes for the threads of a checkpoint
    that will never be whole.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
