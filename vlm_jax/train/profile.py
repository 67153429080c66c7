"""A trace of some steps, for TensorBoard's profiler or Perfetto."""

import jax

from vlm_jax.config import Train
from vlm_jax.runtime.workdir import Workdir


class Profile:
    """Traces the steps of `train.profile_steps` on the first process, into the work folder.

    A run that continues traces the remaining ones.
    """

    def __init__(self, cfg: Train, workdir: Workdir):
        self._steps = cfg.profiled if jax.process_index() == 0 else range(0)
        self._folder = str(workdir.profile)
        self._is_running = False

    def before(self, step: int) -> None:
        if step in self._steps and not self._is_running:
            jax.profiler.start_trace(self._folder)
            self._is_running = True

    def after(self, step: int, outputs) -> None:
        """Ends the trace after its last step, once that step's `outputs` are computed."""
        if self._is_running and step + 1 not in self._steps:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        if self._is_running:
            jax.profiler.stop_trace()
            self._is_running = False
