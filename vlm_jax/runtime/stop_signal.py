"""Agreement of all processes on the step after which they stop, once one of them gets SIGTERM."""

import jax
import numpy as np

from vlm_jax import sharding


class StopSignal:
    """SIGTERM of any process, received by all processes after the same step."""

    def __init__(self, mesh: jax.sharding.Mesh):
        self._is_signaled = False
        self._flag_sharding = sharding.per_device_sharding(mesh)
        self._any = jax.jit(jax.numpy.max, out_shardings=sharding.replicated(mesh))
        self._previous_flag = None

    def on_signal(self) -> None:
        """Records a signal; further signals change nothing."""
        self._is_signaled = True

    def received(self) -> bool:
        """Returns whether to stop after this step; every process calls it once a step.

        With several processes the result is one step old: whether any of them had its signal at
        the step before. It is computed beside the steps, so that no process waits for another, and
        all of them stop after the same step.
        """
        if jax.process_count() == 1:
            return self._is_signaled
        own_flags = np.full(len(jax.local_devices()), self._is_signaled, np.int32)
        flags = jax.make_array_from_process_local_data(self._flag_sharding, own_flags)
        previous, self._previous_flag = self._previous_flag, self._any(flags)
        return previous is not None and int(previous) > 0
