"""The folder of a run: what lies where, and whether a run may continue in it."""

import contextlib
import dataclasses
import fcntl
import json
import os
from pathlib import Path

from vlm_jax import config_file
from vlm_jax.config import ConfigError, Distributed, Experiment
from vlm_jax.limits import check_path

# Fields that change nothing of what is learnt, but for the order of sums: a run may continue with others.
OF_THE_MACHINE = (
    "mesh.",
    "distributed.",
    "data.dir",
    "data.threads",
    "data.prefetch",
    "train.keep_",
    "train.checkpoint_every_steps",
    "train.log_every_steps",
    "train.profile_steps",
    "train.compilation_cache_dir",
)
FREE = (
    *OF_THE_MACHINE,
    "train.microbatches",
    "train.loss_chunk",
    *(f"{part}.{name}" for part in ("vision", "decoder") for name in ("remat", "unroll")),
)


class Workdir:
    """Paths of a run's files."""

    def __init__(self, path: str):
        check_path("workdir", path)
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.processor = self.path / "processor"  # files beside the weights of the checkpoint that the run began with
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.profile = self.path / "profile"
        self._lock = self.path / ".lock"
        self.eval = self.path / "eval.json"
        self.predictions = self.path / "predictions.jsonl"
        self.samples = self.path / "samples.png"

    def read_config(self) -> Experiment:
        """The experiment of the run that lies here, with `workdir` where the folder is now."""
        try:
            text = self.config.read_bytes()
        except FileNotFoundError:
            raise ConfigError(f"--workdir {self.path} holds no run: there is no {self.config}.") from None
        except OSError as error:
            raise ConfigError(f"--workdir {self.path} holds no run: {self.config}: {error.strerror}.") from None
        cfg = config_file.from_json(text, str(self.config))
        return dataclasses.replace(cfg, workdir=str(self.path))

    def check(self, cfg: Experiment) -> None:
        """Raises ConfigError where the folder holds a run with another config; fields of `FREE` may be others."""
        with self.writing():
            if not self.config.exists():
                self._refuse_unknown_run()
                return
        changed = config_file.differences(self.read_config(), cfg)
        changed = [line for line in changed if not line.startswith(FREE)]
        if changed:
            raise ConfigError(
                f"workdir {self.path} holds a run with another config; choose another --workdir or undo:\n  "
                + "\n  ".join(changed)
            )

    def _refuse_unknown_run(self) -> None:
        if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
            raise ConfigError(
                f"workdir {self.path} holds checkpoints and no {self.config.name} that says of which run: choose "
                "another --workdir."
            )

    def open(self, cfg: Experiment) -> None:
        """Makes the folder and writes its config, once it is checked.

        Raises:
          ConfigError: it cannot be written, or holds a run with another config; nothing is changed then.
        """
        self.check(cfg)
        with self.writing():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            of_any_process = dataclasses.replace(cfg, distributed=Distributed())  # the run may go on with others
            write_whole(self.config, config_file.to_json(of_any_process))

    @contextlib.contextmanager
    def locked(self):
        """Keeps other processes out of the folder; the system lifts the lock when this process ends, however it ends.

        Raises:
          ConfigError: another process trains in the folder, or it cannot be written.
        """
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self._lock, "a")  # noqa: SIM115
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"workdir {self.path} is in use: another process trains there; wait for it, or choose another "
                    "--workdir."
                ) from None
            yield

    def refuse_second(self) -> None:
        """Raises ConfigError where another process trains in the folder; makes nothing."""
        if self._lock.exists():
            with self.locked():
                pass

    def try_writing(self) -> None:
        """Raises ConfigError where nothing can be written: to be known before the work, not after it."""
        trial = self.path / ".trial"
        with self.writing():
            trial.touch()
            trial.unlink()

    @contextlib.contextmanager
    def writing(self):
        """Raises ConfigError where a file of the folder cannot be written meanwhile."""
        try:
            yield
        except OSError as error:
            raise ConfigError(f"workdir {self.path} cannot be written: {error.strerror}.") from None


def is_run(folder: str | os.PathLike) -> bool:
    """Whether a folder is a run of ours: its config.json has our sections and no model_type."""
    try:
        config = json.loads((Path(folder).expanduser() / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "fusion" in config and "model_type" not in config


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is seen whole or not at all, and leaves nothing beside it where it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
