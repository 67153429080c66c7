"""Runs of a study as separate processes.

Finished runs are skipped, stopped ones continue, and a failed one stops no other.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlm_jax.config import ConfigError, UserError, files
from vlm_jax.runtime.preemption import RESUME_ME
from vlm_jax.runtime.workdir import EvaluationFolder, Workdir, write_atomic
from vlm_jax.study.planning import Probe, Run, probe_experiment, resolve_checkpoints
from vlm_jax.study.run import record

POLL_SECONDS = 0.2
# Experiment of a probe, in the folder of its answers.
PROBE_CONFIG = "experiment.json"


class Stopped(Exception):
    """Raised by SIGTERM or Ctrl-C, after every run was told to save and stop."""

    def __init__(self, number: int):
        super().__init__("stopped; the runs are saved, and the same command continues them.")
        self.exit_code = RESUME_ME if number == signal.SIGTERM else 130


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raises `Stopped` on SIGTERM and Ctrl-C."""

    def stop(number, _):
        # Ignore a second signal: the runs are saving.
        for handled in handlers:
            signal.signal(handled, signal.SIG_IGN)
        raise Stopped(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def is_done(run: Run) -> bool:
    """Returns True if the run is trained and evaluated, and has answered its probes."""
    return all(output.exists() for output in outputs(run))


def outputs(run: Run) -> list[Path]:
    """Returns the last file of the training and of each probe, in their order."""
    probed = [EvaluationFolder(run.probe_folder(probe.name)).eval for probe in run.probes]
    return [Workdir(run.cfg.workdir).eval, *probed]


def run_command(*arguments: str) -> list[str]:
    """Returns the command line of `run.py` with these arguments."""
    return [sys.executable, str(record.ROOT / "run.py"), *arguments]


@dataclass
class Process:
    """A run in progress: its training, or one of its probes."""

    run: Run
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        cfg = self.run.cfg
        training, *probed = outputs(self.run)
        unanswered = [pair for pair in zip(self.run.probes, probed) if not pair[1].exists()]
        if training.exists() and unanswered:
            probe, self.output = unanswered[0]
            self.command = make_probe_command(self.run, probe)
        else:
            self.output = training
            for folder in self.run.prerequisites:
                # A stopped one has checkpoints, too.
                if not Workdir(folder).eval.exists():
                    raise ConfigError(f"prerequisite {folder} is not finished.")
            resolved = resolve_checkpoints(cfg)
            Workdir(cfg.workdir).open(resolved)
            self.command = run_command("train", "--workdir", cfg.workdir)
        # Read at the start: the files of the repository may change during the run.
        self._environment = record.environment()
        self._process = spawn(self.command, Path(cfg.workdir) / record.LOG)

    def exit_code(self) -> int | None:
        """Returns None while the run is in progress; -15 if signal 15 ended it."""
        return self._process.poll()

    def terminate(self) -> None:
        """Makes the run save and stop."""
        self._process.terminate()

    def wait_and_record(self) -> dict:
        """Waits for the end of the run, and returns its record with this attempt."""
        code = self._process.wait()
        seconds = time.monotonic() - self.start
        workdir = self.run.cfg.workdir
        return record.add_attempt(workdir, self.command, seconds, code, self._environment)


def make_probe_command(run: Run, probe: Probe) -> list[str]:
    """Writes the experiment of a probe, and returns the command line that evaluates it."""
    folder = run.probe_folder(probe.name)
    cfg = probe_experiment(Workdir(run.cfg.workdir).read_config(), probe, folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / PROBE_CONFIG
    write_atomic(config, files.to_json(cfg))
    return [sys.executable, "-m", "vlm_jax.study.run.probing", str(config)]


def spawn(command: list[str], log: Path) -> subprocess.Popen:
    """Starts a process that can import this package and writes its output to a file.

    It has its own session, so that a Ctrl-C in the terminal reaches the study alone.
    """
    paths = filter(None, [str(record.ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with open(log, "a") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def call(command: list[str], log: Path) -> int:
    """Runs a process and returns its exit code; it is stopped with the study."""
    process = spawn(command, log)
    try:
        return process.wait()
    finally:
        process.terminate()
        process.wait()


class Queue:
    """Runs in their order, several at a time; prints a line about each run that ends."""

    def __init__(self, runs: list[Run], expected_seconds: Mapping[Run, float]):
        self._waiting = [run for run in runs if not is_done(run)]
        self._active: list[Process] = []
        self._expected = expected_seconds
        self._count = len(runs)
        self._ended = len(runs) - len(self._waiting)
        self._finished_seconds = 0.0  # expected seconds of the runs that finished here
        self._start_time = 0.0
        self.failed: list[Run] = []

    def work(self, jobs: int) -> None:
        """Runs all that are not done.

        Raises:
          Stopped: a signal stopped the study and its runs.
        """
        if self._ended:
            print(f"{self._ended} of {self._count} runs are done", flush=True)
        self._start_time = time.monotonic()
        try:
            while self._waiting or self._active:
                while self._waiting and len(self._active) < jobs:
                    self._start(self._waiting.pop(0))
                time.sleep(POLL_SECONDS)
                self._end_finished()
        finally:
            # Stop all before waiting for any, so that they save at the same time.
            for process in self._active:
                process.terminate()
            for process in self._active:
                process.wait_and_record()

    def _start(self, run: Run) -> None:
        # Another process of this study may have finished it.
        if is_done(run):
            self._print(run, "is done")
            return
        try:
            Workdir(run.cfg.workdir).refuse_second()
            record.read(run.cfg.workdir)
        except ConfigError as error:
            # Another process trains it, or its record is damaged: leave its files alone.
            self._fail(run, str(error))
            return
        try:
            self._active.append(Process(run))
        except UserError as error:
            # It cannot start, for example because its prerequisite failed.
            record.add_error(run.cfg.workdir, str(error))
            self._fail(run, str(error))

    def _end_finished(self) -> None:
        finished = [process for process in self._active if process.exit_code() is not None]
        for process in finished:
            self._active.remove(process)
            self._end(process)

    def _end(self, process: Process) -> None:
        run = process.run
        run_record = process.wait_and_record()
        code = process.exit_code()
        if code == RESUME_ME or (not code and process.output.exists() and not is_done(run)):
            # To be continued, or its probes are next.
            self._waiting.insert(0, run)
        elif code or not is_done(run):
            log = f"{run.cfg.workdir}/{record.LOG}"
            self._fail(run, f"exit code {code}: {run_record['error']} (log: {log})")
        else:
            self._finished_seconds += self._expected[run]
            minutes = sum(attempt["seconds"] for attempt in run_record["attempts"]) / 60
            self._print(run, f"done in {minutes:.1f} min")

    def _fail(self, run: Run, reason: str) -> None:
        self.failed.append(run)
        self._print(run, f"failed: {reason}")

    def _print(self, run: Run, status: str) -> None:
        self._ended += 1
        line = f"[{self._ended}/{self._count}] {run.name}  {status}{self._remaining_time()}"
        print(line, flush=True)

    def _remaining_time(self) -> str:
        """Returns the expected time of the other runs, by the speed of the finished ones."""
        unfinished = [*self._waiting, *(process.run for process in self._active)]
        remaining = sum(self._expected[run] for run in unfinished)
        if not remaining or not self._finished_seconds:
            return ""
        elapsed = time.monotonic() - self._start_time
        minutes = remaining * elapsed / self._finished_seconds / 60
        return f"; about {minutes:.0f} min left"
