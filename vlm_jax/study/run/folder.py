"""The folder of a study: what lies where, and whether a study may go on in it."""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from vlm_jax.config import ConfigError, Experiment, Fusion
from vlm_jax.config.validate import flat
from vlm_jax.runtime.workdir import MACHINE_FIELDS, write_atomic
from vlm_jax.study.planning import Plan
from vlm_jax.study.run import record

MEASURED = {
    "step_seconds",
    "peak_memory_bytes",
    "decoded_tokens_per_second",
    "data_sha256",
}  # of a model, at least
RUN_FIELDS = ("workdir", *MACHINE_FIELDS)  # fields that make no other study


def default_folder(file: str, quick: bool) -> Path:
    """Where the study of a file is kept without --folder."""
    return Path("runs", "studies", Path(file).stem + ("_quick" if quick else ""))


class Folder:
    """Paths of a study's files, beside the work folders of its runs, `<axis>/<arm>/seed_<n>`."""

    def __init__(self, path: Path):
        self.path = path
        self.definition = path / "study.json"
        self.measured = path / "measured"

    def measurement(self, model: str) -> Path:
        return self.measured / f"{model}.json"

    def read_measurement(self, model: str) -> dict | None:
        """What was measured of a model (`measuring`); None where nothing was yet."""
        file = self.measurement(model)
        if not file.exists():
            return None
        found = record.read_json(file)
        if missing := MEASURED - found.keys():
            raise ConfigError(
                f"{file} has no {', '.join(sorted(missing))}: remove it to have the model measured again."
            )
        return found

    def seeds(self) -> int:
        """With how many the study was run so far; 0 where it was not."""
        return self._defined("seeds") if self.definition.exists() else 0

    def commands(self) -> list[str]:
        """The different commands that ran the study here, in their order; none in folders of older versions."""
        return (
            record.read_json(self.definition).get("commands", [])
            if self.definition.exists()
            else []
        )

    def _defined(self, name: str):
        found = record.read_json(self.definition)
        if name not in found:
            raise ConfigError(f"{self.definition} names no {name}: it is no study's.")
        return found[name]

    def check(self, plan: Plan) -> None:
        """Raises ConfigError where the folder holds another version of the study; arms, axes and seeds may be added."""
        if not self.definition.exists():
            return
        old, new = self._defined("experiments"), definition(plan)["experiments"]
        changed = [f"{name}: is gone" for name in old if name not in new]
        for name in old.keys() & new.keys():
            changed += [f"{name}: {line}" for line in differences(old[name], new[name])]
        if changed:
            raise ConfigError(
                f"folder {self.path} holds another version of this study; choose another --folder, or undo:\n  "
                + "\n  ".join(sorted(changed))
            )

    def open(self, plan: Plan, command: str = "") -> None:
        """Makes the folder and writes down what the study is and by which command it is run, once it is checked.

        Raises:
          ConfigError: it cannot be written, or holds another version; nothing is changed then.
        """
        self.check(plan)
        try:
            self.measured.mkdir(parents=True, exist_ok=True)
            commands = dict.fromkeys(filter(None, (*self.commands(), command)))
            kept = {"seeds": max(plan.study.seeds, self.seeds()), "commands": list(commands)}
            write_atomic(self.definition, json.dumps(definition(plan) | kept, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"folder {self.path} cannot be written: {error.strerror}.") from None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other process does in this folder what is done once for all runs."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def definition(plan: Plan) -> dict:
    """The study as it is run, as JSON has it: every experiment with all its fields."""
    study = plan.study
    experiments = {f"first/{name}": cfg for name, cfg in plan.first.items()}
    experiments |= {f"{axis}/{arm}": cfg for (axis, arm), cfg in plan.arms.items()}
    return {
        **{
            name: getattr(study, name)
            for name in ("question", "reference", "metric", "tolerance", "seeds")
        },
        "matched": dict(study.matched),
        "experiments": {name: as_json(cfg) for name, cfg in experiments.items()},
    }


def as_json(cfg: Experiment) -> dict[str, object]:
    """{"section.field": value} without what is no matter of a study."""
    kept = {name: value for name, value in flat(cfg).items() if not name.startswith(RUN_FIELDS)}
    return json.loads(json.dumps(kept))


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """A line for every field that differs and has an effect; a field that is missing counts as its default."""
    defaults = as_json(Experiment())
    unused = {f"fusion.{name}" for name in Fusion(new["fusion.kind"]).unused}
    names = dict.fromkeys(name for name in (*old, *new) if name not in unused)
    pairs = [
        (name, old.get(name, defaults.get(name)), new.get(name, defaults.get(name)))
        for name in names
    ]
    return [f"{name}: {was} -> {is_now}" for name, was, is_now in pairs if was != is_now]
