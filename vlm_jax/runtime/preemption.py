"""SIGTERM, by which a machine that is taken away says so: the run saves, stops, and may be started again.

Imports no JAX: the signal may come while that is imported.
"""

import contextlib
import signal
import sys
import threading

from vlm_jax.runtime.process import exit_now

RESUME_ME = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"
STOPPED = "stopped by SIGTERM: the same command continues the run."


class Preempted(RuntimeError):
    """The run was asked to stop; the same command continues it."""

    on_all_processes = True


class PreemptedLocally(Preempted):
    """This process stopped where it was, without the others."""

    on_all_processes = False


@contextlib.contextmanager
def handler(action):
    """SIGTERM calls `action()` meanwhile. Signals come to the main thread alone: in another one nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_at_once():
    """An `action` for where nothing is to be saved."""
    raise PreemptedLocally(STOPPED)


def leave_at_once():
    """An `action` for where nothing has begun: a module that is being imported may catch what is raised in it."""
    print(STOPPED, file=sys.stderr)
    exit_now(RESUME_ME)


def ignore() -> None:
    """For a process that is about to end: another signal must not change the code with which it does."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
