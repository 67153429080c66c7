"""SIGTERM before a preemption: the run saves a checkpoint and exits with 75, so that it can resume.

Imports no JAX: the signal may arrive while JAX is imported.
"""

import contextlib
import signal
import sys
import threading

from vlm_jax.runtime.process import exit_now

RESUME_ME = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"
STOPPED = "stopped by SIGTERM: the same command continues the run."


class Preempted(RuntimeError):
    """All processes stopped after the same step; the same command continues the run."""

    on_all_processes = True


class PreemptedLocally(Preempted):
    """This process stopped at once, without the others."""

    on_all_processes = False


@contextlib.contextmanager
def handler(action):
    """Calls `action()` on SIGTERM within the context.

    Signals reach only the main thread: in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_at_once():
    """Raises PreemptedLocally: the `action` while nothing needs to be saved."""
    raise PreemptedLocally(STOPPED)


def leave_at_once():
    """Ends the process: the `action` during imports, in which modules may catch exceptions."""
    print(STOPPED, file=sys.stderr)
    exit_now(RESUME_ME)


def ignore() -> None:
    """Ignores further signals: they must not change the exit code of a process that is ending."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
