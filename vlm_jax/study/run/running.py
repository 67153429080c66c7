"""Runs of a study as processes of their own: skipped when done, continued when stopped, left alone when they fail."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlm_jax.config import ConfigError, UserError
from vlm_jax.runtime.preemption import RESUME_ME
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.study.planning import Run, resolved
from vlm_jax.study.run import record

PAUSE_SECONDS = 0.2  # between looks at the processes


class Stopped(Exception):
    """SIGTERM or Ctrl-C came; every run was told to save and stop."""

    def __init__(self, number: int):
        super().__init__("stopped; the runs are saved, and the same command continues them.")
        self.exit_code = RESUME_ME if number == signal.SIGTERM else 130


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and Ctrl-C raise `Stopped` meanwhile."""

    def stop(number, _):
        for one in before:  # a second one is not heard: the runs are saving
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_done(run: Run) -> bool:
    """Whether it is trained and evaluated: its scores are written last."""
    return Workdir(run.cfg.workdir).eval.exists()


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(record.ROOT / "run.py"), *arguments]


@dataclass
class Process:
    """A run that is under way."""

    run: Run
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        cfg = resolved(self.run.cfg)
        Workdir(cfg.workdir).open(cfg)
        self.command = command("train", "--workdir", cfg.workdir)
        self._environment = record.environment()  # of now: files may change while it runs
        self._process = spawn(self.command, Path(cfg.workdir) / record.LOG)

    def exit_code(self) -> int | None:
        """None while it runs; -15 where a signal 15 ended it."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """It saves what it has, and ends."""
        self._process.terminate()

    def note(self) -> dict:
        """Waits for its end, and writes down how it went."""
        code = self._process.wait()
        return record.add(
            self.run.cfg.workdir,
            self.command,
            time.monotonic() - self.began,
            code,
            self._environment,
        )


def spawn(arguments: list[str], log: Path) -> subprocess.Popen:
    """A process that knows this package, says everything to a file, and hears no Ctrl-C that is meant for the study."""
    paths = filter(None, [str(record.ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with open(log, "a") as file:
        return subprocess.Popen(
            arguments, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def call(arguments: list[str], log: Path) -> int:
    """Runs a process to its end and returns its exit code; it is stopped with the study."""
    process = spawn(arguments, log)
    try:
        return process.wait()
    finally:
        process.terminate()
        process.wait()


class Queue:
    """Runs in their order, some at a time, and a line about each that ends."""

    def __init__(self, runs: list[Run], expected_seconds: Mapping[Run, float]):
        self._waiting = [run for run in runs if not is_done(run)]
        self._active: list[Process] = []
        self._expected = expected_seconds
        self._count, self._ended = len(runs), len(runs) - len(self._waiting)
        self._spent = self._began = 0.0
        self.failed: list[Run] = []

    def work(self, jobs: int) -> None:
        """Runs all that are not done.

        Raises:
          Stopped: the study was asked to stop; so were its runs.
        """
        if self._ended:
            print(f"{self._ended} of {self._count} runs are done", flush=True)
        self._began = time.monotonic()
        try:
            while self._waiting or self._active:
                while self._waiting and len(self._active) < jobs:
                    self._start(self._waiting.pop(0))
                time.sleep(PAUSE_SECONDS)
                for process in [one for one in self._active if one.exit_code() is not None]:
                    self._active.remove(process)
                    self._end(process)
        finally:
            for process in self._active:
                process.ask_to_stop()
            for process in self._active:
                process.note()

    def _start(self, run: Run) -> None:
        if is_done(run):  # by a process beside this one
            self._say(run, "is done")
            return
        try:
            Workdir(run.cfg.workdir).refuse_second()
            record.read(run.cfg.workdir)
        except (
            ConfigError
        ) as error:  # another process trains it, or what is written of it is damaged
            self._fail(run, str(error))
            return
        try:
            self._active.append(Process(run))
        except UserError as error:  # it cannot begin, as where what it builds on is not there
            record.refuse(run.cfg.workdir, str(error))
            self._fail(run, str(error))

    def _end(self, process: Process) -> None:
        run, noted = process.run, process.note()
        code = process.exit_code()
        if code == RESUME_ME:
            self._waiting.insert(0, run)
        elif code or not is_done(run):
            self._fail(
                run,
                f"exit code {code}: {noted['error']} (all it said: {run.cfg.workdir}/{record.LOG})",
            )
        else:
            self._spent += self._expected[run]
            self._say(run, f"done in {noted['attempts'][-1]['seconds'] / 60:.1f} min")

    def _fail(self, run: Run, why: str) -> None:
        self.failed.append(run)
        self._say(run, f"failed: {why}")

    def _say(self, run: Run, what: str) -> None:
        self._ended += 1
        print(f"[{self._ended}/{self._count}] {run.name}  {what}{self._left()}", flush=True)

    def _left(self) -> str:
        """How long the others will take, if they go as those that ended did."""
        left = sum(
            self._expected[run] for run in (*self._waiting, *(one.run for one in self._active))
        )
        if not left or not self._spent:
            return ""
        return f"; about {left * (time.monotonic() - self._began) / self._spent / 60:.0f} min left"
