"""How all processes learn that one of them had SIGTERM, and stop after the same step."""

import jax
import numpy as np

from vlm_jax import axes


class StopSignal:
    """Whether the run shall stop after this step, the same on every process."""

    def __init__(self, mesh: jax.sharding.Mesh):
        self._came = False
        self._flags = axes.per_device_sharding(mesh)
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
        before, self._agreed = (
            self._agreed,
            self._any(jax.make_array_from_process_local_data(self._flags, mine)),
        )
        return before is not None and int(before) > 0
