"""Metrics of a training run: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import jax
from tqdm import tqdm

from vlm_jax.config import Train
from vlm_jax.runtime.workdir import Workdir, write_atomic
from vlm_jax.train.checkpoint import NO_LOSSES, LossSum
from vlm_jax.train.trackers import Tracker

SECONDS = "validation_seconds"  # field of the rows of validations alone


def _is_complete(line: str) -> bool:
    """Returns False for the rest of a line that a crash left."""
    try:
        return line.endswith("\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


@dataclass(frozen=True)
class StepStats:
    """Counts of a step's global batch, and the wait of the first process for it."""

    tokens: int
    token_slots: int  # B*S: tokens and padding
    images: int  # tiles and thumbnails of images that are cut; patches at native resolution
    image_slots: int  # B*I: images, and slots that no token attends to; B*P: patches and padding
    examples: int  # questions, or conversations
    data_wait_seconds: float


class Board:
    """Writes the rows of a run for TensorBoard.

    It uses the parts of TensorBoard's writer that do not import TensorFlow.

    Args:
      start: as in `Log`; TensorBoard hides the rows of later steps that earlier files hold.
    """

    def __init__(self, folder: Path, start: int):
        # They take half a second, which only a training run should wait for.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events, self._summaries = event_pb2, summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._writer = RecordWriter(open(folder / name, "wb"))  # noqa: SIM115
        self._add(file_version="brain.Event:2")
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(session_log=restart, step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values by their tags."""
        summaries = [
            self._summaries.Summary.Value(tag=tag, simple_value=value)
            for tag, value in values.items()
        ]
        self._add(summary=self._summaries.Summary(value=summaries), step=step)
        self._writer.flush()

    def _add(self, **fields) -> None:
        event = self._events.Event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())

    def close(self) -> None:
        self._writer.close()


class Log:
    """Writes a row after step 1, every `train.log_every_steps` and the last step.

    A row summarizes the steps since the row before. A validation has a row of its own.

    Args:
      start: step of the checkpoint that the run continues from; 0 for a new run.
      seconds_at_peak: seconds of a step at the devices' peak matmul throughput; None: unknown.
      loss_sum: the losses up to `start` that no row contains yet.
      data_counts: counts over the training data, the same in every row.
      trackers: get the values of the rows, too.
      repeats_validation: the validation of step `start` is repeated.
      source_names: of the sources of a mixture.
    """

    def __init__(
        self,
        workdir: Workdir,
        start: int,
        cfg: Train,
        seconds_at_peak: float | None,
        loss_sum: LossSum = NO_LOSSES,
        data_counts: Mapping[str, int] = MappingProxyType({}),
        trackers: Sequence[Tracker] = (),
        repeats_validation: bool = False,
        source_names: Sequence[str] = (),
    ):
        self._drop_repeated_rows(workdir, start, repeats_validation)
        self._file = open(workdir.metrics, "a")  # noqa: SIM115
        self._outputs = (Board(workdir.tensorboard, start), *trackers)
        self._bar = None
        self._start = start
        self._steps, self._every_steps = cfg.steps, cfg.log_every_steps
        self._seconds_at_peak = seconds_at_peak
        self._data_counts = data_counts
        self._source_names = source_names
        self.loss_sum = loss_sum
        self._begin_window()

    def _drop_repeated_rows(self, workdir: Workdir, start: int, repeats_validation: bool) -> None:
        """Drops the rows of what is repeated after the checkpoint that the run continues from."""

        def is_kept(line: str) -> bool:
            if not _is_complete(line):
                return False
            row = json.loads(line)
            is_repeated = repeats_validation and row["step"] == start and SECONDS in row
            return row["step"] <= start and not is_repeated

        if workdir.metrics.exists():
            lines = workdir.metrics.read_text(errors="replace").splitlines(keepends=True)
            write_atomic(workdir.metrics, "".join(filter(is_kept, lines)))

    def _begin_window(self):
        self._window_start, self._window = time.perf_counter(), []

    @contextlib.contextmanager
    def compiling(self):
        """Prints the seconds of a compilation and excludes them from the speed of the steps."""
        print("compiling the training step ...", flush=True)
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        print(f"compiled in {seconds:.1f} s", flush=True)
        self._window_start += seconds

    def step(
        self,
        step: int,
        metrics: dict[str, float],
        stats: StepStats,
        sources: Sequence[Sequence[float]] = (),
    ) -> None:
        """Adds step number `step` (from 1), and writes a row if one is due.

        Args:
          metrics: of this step alone.
          sources: of each source of a mixture its nats, scored tokens and tokens.
        """
        self._window.append(stats)
        self.loss_sum = self.loss_sum.add(metrics["loss"], sources)
        self._advance_bar()
        if step % self._every_steps and step not in (1, self._steps):
            return
        row = {
            "step": step,
            **metrics,
            "loss": self.loss_sum.total / self.loss_sum.steps,
            **self._of_sources(),
            # Padding is of this step alone, so that a resumed run logs the same.
            "padding_fraction": _padding_fraction(stats.tokens, stats.token_slots),
            "image_padding_fraction": _padding_fraction(stats.images, stats.image_slots),
            **self._data_counts,
            **self._speeds(),
            "hbm_peak_bytes": hbm_peak_bytes(),
        }
        self._begin_window()
        self.loss_sum = NO_LOSSES
        # None stands for what the devices do not report.
        values = {f"train/{name}": x for name, x in row.items() if x is not None and name != "step"}
        self._write(row, values)
        self._show(row)

    def validation(self, step: int, scores: Mapping[str, float], seconds: float) -> None:
        """Writes a row of scores; their seconds are not part of the speed of the steps."""
        self._window_start += seconds
        values = {**scores, SECONDS: seconds}
        self._write({"step": step, **values}, values)
        numbers = "  ".join(f"{name} {score:.4f}" for name, score in scores.items())
        line = f"validation {step}/{self._steps}  {numbers}  {seconds:.1f} s"
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def _speeds(self) -> dict[str, float | None]:
        """Means over the steps since the last row; `mfu` is the model FLOPs utilization."""
        steps = len(self._window)
        seconds = time.perf_counter() - self._window_start
        step_seconds = seconds / steps
        peak = self._seconds_at_peak
        return {
            "step_seconds": step_seconds,
            "data_wait_seconds": sum(stats.data_wait_seconds for stats in self._window) / steps,
            "tokens_per_second": sum(stats.tokens for stats in self._window) / seconds,
            "examples_per_second": sum(stats.examples for stats in self._window) / seconds,
            "mfu": None if peak is None else peak / step_seconds,
        }

    def _of_sources(self) -> dict[str, float | None]:
        """Loss and share of tokens of each source of a mixture, since the last row.

        The loss is None if no token of the source was scored.
        """
        sums = self.loss_sum.sources
        all_tokens = sum(tokens for _, _, tokens in sums)
        losses, shares = {}, {}
        for name, (nats, scored, tokens) in zip(self._source_names, sums, strict=True):
            losses[f"loss/{name}"] = nats / scored if scored else None
            shares[f"token_share/{name}"] = tokens / all_tokens
        return losses | shares

    def _advance_bar(self) -> None:
        """Creates the bar with the first step: lines that are printed before would break it."""
        if self._bar is None and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._steps, initial=self._start, unit="step", dynamic_ncols=True
            )
        if self._bar is not None:
            self._bar.update()

    def _write(self, row: Mapping[str, float | None], values: Mapping[str, float]) -> None:
        """Writes a row, and its values by their tags in TensorBoard."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # mounted buckets keep only synced data
        for output in self._outputs:
            output.write(row["step"], values)

    def _show(self, row: Mapping[str, float]) -> None:
        """Shows a row of the training on the bar, or prints it."""
        loss, speed = f"{row['loss']:.4f}", f"{row['examples_per_second']:.0f} examples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss}, {speed}")
            return
        seconds_left = (self._steps - row["step"]) * row["step_seconds"]
        left = time.strftime("%H:%M:%S", time.gmtime(seconds_left))
        print(f"step {row['step']}/{self._steps}  loss {loss}  {speed}  {left} left", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        for output in self._outputs:
            output.close()


def _padding_fraction(used: int, slots: int) -> float:
    return 1 - used / slots if slots else 0.0


def hbm_peak_bytes() -> int | None:
    """Returns the peak memory of the fullest device of this process; None: not reported (CPU)."""
    peaks = []
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        if stats.get("peak_bytes_in_use") is not None:
            peaks.append(stats["peak_bytes_in_use"])
    return max(peaks, default=None)
