"""SIGTERM, by which a machine that is taken away says so: the run saves, stops, and may be started again."""

import contextlib
import signal
import threading

import jax
import numpy as np

from vlm_jax import axes

RESUME_ME = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"


class Preempted(RuntimeError):
    """The run was asked to stop; the same command continues it."""


class StoppedAlone(Preempted):
    """This process stopped where it was, without the others."""


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
    raise StoppedAlone("stopped by SIGTERM: the same command continues the run.")


def ignore() -> None:
    """For a process that is about to end: another signal must not change the code with which it does."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Notice:
    """Whether the run shall stop after this step, the same on every process."""

    def __init__(self, mesh: jax.sharding.Mesh):
        self._came = False
        self._flags = axes.one_a_device(mesh)
        self._any = jax.jit(jax.numpy.max, out_shardings=axes.replicated(mesh))
        self._agreed = None

    def note(self) -> None:
        """Takes note of a signal; another one changes nothing."""
        self._came = True

    def stop(self) -> bool:
        """To be asked by every process once a step.

        With several processes the answer is that to the question of the step before, when any of them had its signal:
        that is computed beside the steps, so that no process waits for another, and all stop at the same step.
        """
        if jax.process_count() == 1:
            return self._came
        mine = np.full(len(jax.local_devices()), self._came, np.int32)
        before, self._agreed = self._agreed, self._any(jax.make_array_from_process_local_data(self._flags, mine))
        return before is not None and int(before) > 0
