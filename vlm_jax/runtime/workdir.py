"""The work folder of a run: paths of its files, and the checks before a run continues in it."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from vlm_jax.config import (
    ConfigError,
    Distributed,
    Eval,
    Experiment,
    files,
)
from vlm_jax.config.bounds import check_path
from vlm_jax.config.model import PRETRAINED_PARTS
from vlm_jax.config.validate import flat, with_fields

# Fields that may change on resume: they affect only speed, memory or the order of summation.
MACHINE_FIELDS = (
    "mesh.",
    "distributed.",
    "data.dir",
    "data.threads",
    "data.prefetch",
    "train.keep_",
    "train.checkpoint_every_steps",
    "train.log_every_steps",
    "train.profile_steps",
    "train.trackers",
    "train.compilation_cache_dir",
)
CHANGEABLE_FIELDS = (
    *MACHINE_FIELDS,
    "train.microbatches",
    "train.loss_chunk",
    # The end of the run depends on it, but no step does.
    "train.patience",
    *(f"{part}.{name}" for part in ("vision", "decoder") for name in ("remat", "unroll")),
)
NAMED_FILES = 3  # of eval.files, in the name of an evaluation
LONGEST_NAME = 60
# Fields of `eval` that the scores of a later evaluation do not depend on.
VALIDATION_FIELDS = ("eval.every_steps", "eval.splits", "eval.during_examples")
# Fields that a checkpoint sets, and that earlier versions set to other values.
TAKEN_OVER = (
    "vision.resize",
    "vision.resize_px",
    "vision.resample",
    "vision.rgb_conversion",
    "data.special_ids",
    "data.template",
)


class EvaluationFolder:
    """Paths of the files of an evaluation."""

    def __init__(self, path: Path):
        self.path = path
        self.eval = path / "eval.json"
        self.predictions = path / "predictions.jsonl"
        self.samples = path / "samples.png"

    def check_writable(self) -> None:
        """Raises ConfigError if nothing can be written: to be known before the evaluation."""
        trial = self.path / ".trial"
        with self.writing():
            trial.touch()
            trial.unlink()

    def keep_settings(self) -> None:
        """Writes the settings that the scores depend on, if the folder has a file for them."""

    @contextlib.contextmanager
    def writing(self):
        """Raises ConfigError if a file cannot be written within the context."""
        try:
            yield
        except OSError as error:
            raise ConfigError(f"workdir {self.path} cannot be written: {error.strerror}.") from None


class LaterEvaluation(EvaluationFolder):
    """The folder of an evaluation by the `eval` verb.

    `settings.json` has the settings that its scores depend on.
    """

    def __init__(self, path: Path, settings: Mapping[str, object]):
        super().__init__(path)
        self._settings = json.dumps(settings, indent=2) + "\n"
        self._settings_file = path / "settings.json"

    def is_free(self) -> bool:
        """Returns True if the folder is empty or has an evaluation with the same settings."""
        try:
            return self._settings_file.read_text() == self._settings
        except (OSError, UnicodeDecodeError):
            return not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))

    def check_writable(self) -> None:
        new_folders = [path for path in (self.path, *self.path.parents) if not path.exists()]
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
        super().check_writable()
        # An evaluation that fails later leaves nothing behind; `keep_settings` creates them again.
        for path in new_folders:
            with contextlib.suppress(OSError):
                path.rmdir()

    def keep_settings(self) -> None:
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self._settings_file, self._settings)


class Workdir(EvaluationFolder):
    """Paths of a run's files, including its evaluation after the training."""

    def __init__(self, path: str):
        check_path("workdir", path)
        super().__init__(Path(path))
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        # Processor files of the public checkpoint that the run was initialized from.
        self.processor = self.path / "processor"
        self.metrics = self.path / "metrics.jsonl"
        # Scores of the best validation.
        self.best = self.path / "best.json"
        # Id of the run in each tracker.
        self.trackers = self.path / "trackers.json"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.profile = self.path / "profile"
        self._data = self.path / "data.json"
        self._later_evaluations = self.path / "eval"
        self._lock = self.path / ".lock"

    def find_step(self, name: str | int | None) -> int | None:
        """Returns the step of the checkpoint that "best", "last" or a number names.

        None stands for the last one, which may be damaged, so that an earlier one is read.

        Raises:
          ConfigError: the name is another, or the run has no best step.
        """
        if name in (None, "last"):
            return None
        if name == "best":
            return self._best_step()
        if isinstance(name, bool) or not str(name).isdecimal():
            raise ConfigError(f"step {name}: it must be best, last or the number of a step.")
        return int(name)

    def _best_step(self) -> int:
        try:
            return json.loads(self.best.read_text())["step"]
        except FileNotFoundError:
            raise ConfigError(
                f"step best: {self.path} has no {self.best.name}, because the run had no "
                "validation (eval.every_steps); choose last or the number of a step."
            ) from None
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"step best: {self.best} is damaged.") from None

    def read_config(self) -> Experiment:
        """Reads the experiment of the run; its `workdir` is the present path of the folder."""
        try:
            text = self.config.read_bytes()
        except FileNotFoundError:
            raise ConfigError(
                f"--workdir {self.path} is not a run: {self.config} does not exist."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"--workdir {self.path} is not a run: {self.config}: {error.strerror}."
            ) from None
        cfg = files.from_json(text, str(self.config))
        return dataclasses.replace(cfg, workdir=str(self.path))

    def as_begun(self, cfg: Experiment, explicit: Collection[str]) -> Experiment:
        """Returns the experiment with the checkpoint settings that the run started with.

        Earlier versions took other settings from a checkpoint (`TAKEN_OVER`). A run that was
        initialized from the same checkpoints keeps them; fields in `explicit` keep their values.
        """
        if not self.config.exists():
            return cfg
        stored = self.read_config()
        folders = (
            "init_from",
            *(f"{part}.checkpoint" for part in PRETRAINED_PARTS),
        )
        old, new = flat(stored), flat(cfg)
        if any(old[name] != new[name] for name in folders):
            return cfg
        return with_fields(cfg, {name: old[name] for name in TAKEN_OVER if name not in explicit})

    def check(self, cfg: Experiment) -> None:
        """Raises ConfigError if the folder has a run whose config differs.

        `CHANGEABLE_FIELDS` may differ.
        """
        with self.writing():
            if not self.config.exists():
                self._refuse_unknown_run()
                return
        changed = files.differences(self.read_config(), cfg)
        changed = [line for line in changed if not line.startswith(CHANGEABLE_FIELDS)]
        if changed:
            raise ConfigError(
                f"workdir {self.path} belongs to a run with a different config; choose another "
                "--workdir or revert:\n  " + "\n  ".join(changed)
            )

    def check_data(self, fingerprint: Mapping[str, str]) -> None:
        """Raises ConfigError if the run was trained on data with another fingerprint.

        A run of a version without fingerprints passes.
        """
        try:
            stored = json.loads(self._data.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self._data} cannot be read ({error}): choose another --workdir."
            ) from None
        if not isinstance(stored, dict):
            raise ConfigError(
                f"{self._data} is damaged: it must hold an object. Choose another --workdir."
            )
        if stored != fingerprint:
            changed = [name for name, value in fingerprint.items() if stored.get(name) != value]
            named = ", ".join(changed or sorted(stored.keys() - fingerprint.keys()))
            raise ConfigError(
                f"workdir {self.path} belongs to a run that was trained on other data: {named} of "
                "data.files or data.source has changed since. Restore the data to continue the "
                "run, or choose another --workdir."
            )

    def keep_data(self, fingerprint: Mapping[str, str]) -> None:
        """Writes the fingerprint of the run's training data."""
        with self.writing():
            write_atomic(self._data, json.dumps(fingerprint, indent=2) + "\n")

    def later_evaluation(
        self, cfg: Experiment, step: int, fingerprint: Mapping[str, str]
    ) -> LaterEvaluation:
        """Returns the folder for an evaluation of a checkpoint by the `eval` verb.

        It is named after the split, the files and the count. An evaluation with other settings is
        never overwritten: a number is added to the name.
        """
        fields = flat(cfg)
        settings = {
            name: value
            for name, value in fields.items()
            if name.startswith(("data.", "eval."))
            and not name.startswith((*MACHINE_FIELDS, *VALIDATION_FIELDS, "eval.batch_size"))
        }
        if not self.config.exists():
            # A public checkpoint without any training: no config.json names the model.
            model = ("init_", "vision.", "projector.", "decoder.", "fusion.")
            settings |= {name: value for name, value in fields.items() if name.startswith(model)}
        settings |= {"step": step, "contents": fingerprint}
        name = evaluation_name(cfg.eval)
        for number in itertools.count(1):
            numbered_name = name if number == 1 else f"{name}-{number}"
            folder = LaterEvaluation(self._later_evaluations / numbered_name, settings)
            if folder.is_free():
                return folder

    def _refuse_unknown_run(self) -> None:
        if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
            raise ConfigError(
                f"workdir {self.path} has checkpoints but no {self.config.name}: choose another "
                "--workdir."
            )

    def open(self, cfg: Experiment) -> None:
        """Creates the folder and writes its config.

        Raises:
          ConfigError: it cannot be written, or has a run whose config differs; nothing is changed.
        """
        self.check(cfg)
        with self.writing():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            # The run may continue on other processes.
            cfg = dataclasses.replace(cfg, distributed=Distributed())
            write_atomic(self.config, files.to_json(cfg))

    @contextlib.contextmanager
    def locked(self):
        """Locks the folder within the context.

        The operating system releases the lock if this process is killed.

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
                    f"workdir {self.path} is in use: another process trains there; wait for it, "
                    "or choose another --workdir."
                ) from None
            yield

    def refuse_second(self) -> None:
        """Raises ConfigError if another process trains in the folder; creates nothing."""
        if self._lock.exists():
            with self.locked():
                pass


def evaluation_name(cfg: Eval) -> str:
    """Returns a folder name: test_500, train_90pct- (train[90%:]), mine_200 (mine.json)."""
    parts = [Path(file).stem for file in cfg.files[:NAMED_FILES]]
    if len(cfg.files) > NAMED_FILES:
        parts.append(f"{len(cfg.files) - NAMED_FILES}_more")
    if not cfg.files or cfg.read_split != "train":
        replaced = str.maketrans({"[": "_", "]": "", ":": "-", "%": "pct"})
        parts.append(cfg.read_split.translate(replaced))
    name = re.sub(r"[^\w.+-]", "_", "+".join(parts)).lstrip(".-")[:LONGEST_NAME]
    return name if cfg.max_examples is None else f"{name}_{cfg.max_examples}"


def is_run(folder: str | os.PathLike) -> bool:
    """Returns True for a run of this program: config.json has its sections and no model_type."""
    try:
        config = json.loads((Path(os.path.expanduser(folder)) / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "fusion" in config and "model_type" not in config


def write_atomic(path: Path, text: str) -> None:
    """Writes a file atomically: to a temporary file that is renamed, or removed on errors."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
