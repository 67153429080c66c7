"""What a run says while it trains: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

import json
import sys
import time

import tensorboardX
from tqdm import tqdm

from vlm_jax.workdir import Workdir, write_whole


def _is_whole(line: str) -> bool:
    """False for what a machine leaves that goes away while it writes."""
    try:
        return line.endswith("\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


class Log:
    """Sums up the steps since the last logged one, and writes them down every `every` steps."""

    def __init__(self, workdir: Workdir, start: int, steps: int, every: int):
        self._forget_after(workdir, start)
        self._file = open(workdir.metrics, "a")  # noqa: SIM115
        self._board = tensorboardX.SummaryWriter(str(workdir.tensorboard), purge_step=start + 1, flush_secs=10)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True) if terminal else None
        self._steps, self._every = steps, every
        self._begin_window()

    def _forget_after(self, workdir: Workdir, start: int) -> None:
        """Drops what was logged after the checkpoint that the run continues from: those steps come again."""
        if workdir.metrics.exists():
            lines = workdir.metrics.read_text(errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _is_whole(line) and json.loads(line)["step"] <= start]
            write_whole(workdir.metrics, "".join(kept))

    def _begin_window(self):
        self._since, self._counted, self._tokens, self._examples = time.perf_counter(), 0, 0, 0

    def step(self, step: int, metrics: dict[str, float], tokens: int, examples: int) -> None:
        """Takes note of step number `step` (from 1), over `tokens` tokens and `examples` questions of all processes."""
        self._counted, self._tokens, self._examples = (
            self._counted + 1,
            self._tokens + tokens,
            self._examples + examples,
        )
        if self._bar is not None:
            self._bar.update()
        if step % self._every and step != self._steps:
            return
        seconds = time.perf_counter() - self._since
        row = {
            "step": step,
            **metrics,
            "step_seconds": seconds / self._counted,
            "tokens_per_second": self._tokens / seconds,
            "examples_per_second": self._examples / seconds,
        }
        self._begin_window()
        self._write(row)

    def _write(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(f"train/{name}", value, row["step"])
        loss, speed = f"{row['loss']:.4f}", f"{row['examples_per_second']:.0f} examples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss}, {speed}")
            return
        left = time.strftime("%H:%M:%S", time.gmtime((self._steps - row["step"]) * row["step_seconds"]))
        print(f"step {row['step']}/{self._steps}  loss {loss}  {speed}  {left} left", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self._board.close()
