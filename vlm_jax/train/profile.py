"""A trace of some steps, for TensorBoard's profiler or Perfetto."""

import jax

from vlm_jax.config import Train
from vlm_jax.runtime.workdir import Workdir


class Profile:
    """Writes `train.profile_steps` of the first process into the work folder's `profile`.

    Of a run that continues, those that are left.
    """

    def __init__(self, cfg: Train, workdir: Workdir):
        self._steps = range(0) if jax.process_index() else cfg.profiled
        self._folder = str(workdir.profile)
        self._running = False

    def before(self, step: int) -> None:
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, outputs) -> None:
        """`outputs` of the step are waited for where it is the last of the trace."""
        if self._running and step + 1 not in self._steps:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
