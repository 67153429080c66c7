"""Files in the folder of a study, and the check that a study may continue in it."""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from vlm_jax.config import ConfigError, Experiment, Fusion, files
from vlm_jax.config.validate import flat
from vlm_jax.runtime.workdir import MACHINE_FIELDS, write_atomic
from vlm_jax.study.contrasts import Contrast
from vlm_jax.study.planning import PREREQUISITES, Plan
from vlm_jax.study.run import record

# A measurement has at least these keys.
MEASUREMENT_KEYS = {
    "step_seconds",
    "peak_memory_bytes",
    "decoded_tokens_per_second",
    "data_sha256",
}
# Fields that may differ between two versions of the same study.
RUN_FIELDS = ("workdir", *MACHINE_FIELDS)


def default_folder(file: str, quick: bool, suffix: str = "") -> Path:
    """Returns the folder of a study file without --folder."""
    names = [Path(file).stem, suffix, "quick" if quick else ""]
    return Path("runs", "studies", "_".join(filter(None, names)))


class Folder:
    """Files of a study, beside the work folders of its runs, `<axis>/<arm>/seed_<n>`."""

    def __init__(self, path: Path):
        self.path = path
        self.definition = path / "study.json"
        self.measured = path / "measured"

    def measurement(self, model: str) -> Path:
        """Returns the file with the measured costs of a model."""
        return self.measured / f"{model}.json"

    def read_measurement(self, model: str) -> dict | None:
        """Returns the measured costs of a model (`measuring.measure`), or None."""
        file = self.measurement(model)
        if not file.exists():
            return None
        measurement = record.read_json(file)
        if missing := MEASUREMENT_KEYS - measurement.keys():
            raise ConfigError(
                f"{file} has no {', '.join(sorted(missing))}: remove it to measure the model again."
            )
        return measurement

    def seeds(self) -> int:
        """Returns the number of seeds run so far; 0 for a new folder."""
        return self._read_definition("seeds") if self.definition.exists() else 0

    def commands(self) -> list[str]:
        """Returns the distinct commands that ran the study here, in order.

        Folders of older versions have none.
        """
        if not self.definition.exists():
            return []
        return record.read_json(self.definition).get("commands", [])

    def contrasts(self) -> dict | None:
        """Returns the contrasts that were named before the first run was done.

        None without a finished run, and for folders of older versions.
        """
        is_begun = self.definition.exists() and any(self.path.glob("*/*/seed_*/eval.json"))
        return record.read_json(self.definition).get("contrasts") if is_begun else None

    def _read_definition(self, name: str):
        values = record.read_json(self.definition)
        if name not in values:
            raise ConfigError(f"{self.definition} has no {name}: it does not describe a study.")
        return values[name]

    def check(self, plan: Plan) -> None:
        """Raises ConfigError if the folder holds another version of the study.

        Arms, axes and seeds may be added.
        """
        if not self.definition.exists():
            return
        old = self._read_definition("experiments")
        new = definition(plan)["experiments"]
        lines = [f"{name}: is gone" for name in old if name not in new]
        for name in old.keys() & new.keys():
            lines += [f"{name}: {line}" for line in diff(files.updated(old[name]), new[name])]
        old_probes = record.read_json(self.definition).get("probes", {})
        for name, overrides in definition(plan)["probes"].items():
            if old_probes.get(name, overrides) != overrides:
                lines.append(f"probe {name}: {old_probes[name]} -> {overrides}")
        if lines:
            raise ConfigError(
                f"folder {self.path} holds another version of this study; "
                "choose another --folder, or undo:\n  " + "\n  ".join(sorted(lines))
            )

    def open(self, plan: Plan, command: str = "") -> None:
        """Creates the folder and writes study.json: the study, and the commands that ran it.

        Raises:
          ConfigError: the folder cannot be written, or holds another version of the study, which
            stays unchanged.
        """
        self.check(plan)
        try:
            self.measured.mkdir(parents=True, exist_ok=True)
            commands = dict.fromkeys(filter(None, (*self.commands(), command)))
            history = {"seeds": max(plan.study.seeds, self.seeds()), "commands": list(commands)}
            named = self.contrasts()
            if named is not None:
                history["contrasts"] = named
            text = json.dumps(definition(plan) | history, indent=1)
            write_atomic(self.definition, text + "\n")
        except OSError as error:
            raise ConfigError(f"folder {self.path} cannot be written: {error.strerror}.") from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder's file lock, for the one-time steps of a study."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def definition(plan: Plan) -> dict:
    """Returns the JSON values of a study: every experiment with all its fields."""
    study = plan.study
    experiments = {}
    for name, versions in plan.prerequisites.items():
        for i, cfg in enumerate(versions):
            experiments[f"{PREREQUISITES}/{name}{f' ({i})' if i else ''}"] = cfg
    experiments |= {f"{axis}/{arm}": cfg for (axis, arm), cfg in plan.arms.items()}
    return {
        "question": study.question,
        "reference": study.reference,
        "metric": study.metric,
        "tolerance": study.tolerance,
        "seeds": study.seeds,
        "matched": dict(study.matched),
        "contrasts": as_stored(study.contrasts),
        "experiments": {name: as_json(cfg) for name, cfg in experiments.items()},
        "probes": {
            probe.name: json.loads(json.dumps(dict(probe.overrides))) for probe in plan.probes
        },
    }


def as_stored(contrasts: Mapping[str, Contrast]) -> dict[str, dict]:
    """Returns the contrasts as `Folder.contrasts` does."""
    return {name: asdict(contrast) for name, contrast in contrasts.items()}


def as_json(cfg: Experiment) -> dict[str, object]:
    """Returns {"section.field": value} of the fields that define a study."""
    fields = {name: value for name, value in flat(cfg).items() if not name.startswith(RUN_FIELDS)}
    return json.loads(json.dumps(fields))


def diff(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Returns a line for every field that differs and has an effect.

    A missing field counts as its default.
    """
    defaults = as_json(Experiment())
    unused = {f"fusion.{name}" for name in Fusion(new["fusion.kind"]).unused}
    lines = []
    for name in dict.fromkeys((*old, *new)):
        old_value = old.get(name, defaults.get(name))
        new_value = new.get(name, defaults.get(name))
        if name not in unused and old_value != new_value:
            lines.append(f"{name}: {old_value} -> {new_value}")
    return lines
