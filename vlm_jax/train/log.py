"""Metrics of a training run: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass

import jax
import tensorboardX
from tqdm import tqdm

from vlm_jax.config import Train
from vlm_jax.runtime.workdir import Workdir, write_atomic
from vlm_jax.train.checkpoint import NO_LOSSES, LossSum


def _is_whole(line: str) -> bool:
    """False for what a machine leaves that goes away while it writes."""
    try:
        return line.endswith("\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


@dataclass(frozen=True)
class StepStats:
    """What a step was given: counts are of all processes, the wait is that of the first."""

    tokens: int
    slots: int  # B*S: tokens and padding
    images: int  # in tiles: views, the thumbnail among them
    image_token_index: int  # B*I: images, and slots that no token reads
    examples: int  # questions, or conversations
    data_wait_seconds: float  # what the loop waited for the batch


class Log:
    """Summarizes the steps since the last logged one after step 1, every `train.log_every_steps` and the last step.

    Args:
      start: the step of the checkpoint that the run continues from; 0 for a new run.
      seconds_at_peak: seconds of a step at the peak rate of the devices; None where that is not known.
      loss_sum: the losses up to `start` that no row has yet.
    """

    def __init__(
        self,
        workdir: Workdir,
        start: int,
        cfg: Train,
        seconds_at_peak: float | None,
        loss_sum: LossSum = NO_LOSSES,
    ):
        self._forget_after(workdir, start)
        self._file = open(workdir.metrics, "a")  # noqa: SIM115
        self._board = tensorboardX.SummaryWriter(
            str(workdir.tensorboard), purge_step=start + 1, flush_secs=10
        )
        self._bar = None
        self._start, self._steps, self._every = start, cfg.steps, cfg.log_every_steps
        self._seconds_at_peak = seconds_at_peak
        self.loss_sum = loss_sum
        self._begin_window()

    def _forget_after(self, workdir: Workdir, start: int) -> None:
        """Drops what was logged after the checkpoint that the run continues from: those steps come again."""
        if workdir.metrics.exists():
            lines = workdir.metrics.read_text(errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _is_whole(line) and json.loads(line)["step"] <= start]
            write_atomic(workdir.metrics, "".join(kept))

    def _begin_window(self):
        self._since, self._work = time.perf_counter(), []

    @contextlib.contextmanager
    def compiling(self):
        """Reports how long the compilation takes; it is left out of the speed of the steps."""
        print("compiling the training step ...", flush=True)
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        print(f"compiled in {seconds:.1f} s", flush=True)
        self._since += seconds

    def step(self, step: int, metrics: dict[str, float], work: StepStats) -> None:
        """Takes note of step number `step` (from 1); `metrics` are those of this step alone."""
        self._work.append(work)
        self.loss_sum = LossSum(self.loss_sum.total + metrics["loss"], self.loss_sum.steps + 1)
        self._advance_bar()
        if step % self._every and step not in (1, self._steps):
            return
        seconds = time.perf_counter() - self._since
        step_seconds = seconds / len(self._work)
        row = {
            "step": step,
            **metrics,
            "loss": self.loss_sum.total / self.loss_sum.steps,
            "padding_fraction": 1
            - work.tokens / work.slots,  # of this step alone, so that a resumed run logs the same
            "image_padding_fraction": 1 - work.images / work.image_token_index
            if work.image_token_index
            else 0.0,
            "step_seconds": step_seconds,
            "data_wait_seconds": sum(one.data_wait_seconds for one in self._work) / len(self._work),
            "tokens_per_second": sum(one.tokens for one in self._work) / seconds,
            "examples_per_second": sum(one.examples for one in self._work) / seconds,
            "mfu": self._seconds_at_peak
            and self._seconds_at_peak / step_seconds,  # model FLOPs utilization
            "hbm_peak_bytes": hbm_peak_bytes(),
        }
        self._begin_window()
        self.loss_sum = NO_LOSSES
        self._write(row)

    def _advance_bar(self) -> None:
        """The bar appears with the first step: lines printed before would tear it apart."""
        if self._bar is None and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._steps, initial=self._start, unit="step", dynamic_ncols=True
            )
        if self._bar is not None:
            self._bar.update()

    def _write(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a mounted bucket shows, and keeps, only what was synced
        for name, value in row.items():
            if name != "step" and value is not None:
                self._board.add_scalar(f"train/{name}", value, row["step"])
        loss, speed = f"{row['loss']:.4f}", f"{row['examples_per_second']:.0f} examples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss}, {speed}")
            return
        left = time.strftime(
            "%H:%M:%S", time.gmtime((self._steps - row["step"]) * row["step_seconds"])
        )
        print(f"step {row['step']}/{self._steps}  loss {loss}  {speed}  {left} left", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self._board.close()


def hbm_peak_bytes() -> int | None:
    """The most that any device of this process has held so far; None where the platform does not say (CPU)."""
    peaks = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    return max((peak for peak in peaks if peak is not None), default=None)
