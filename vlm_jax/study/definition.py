"""What a study is, and the file that it is written in."""

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlm_jax.config import ConfigError, Experiment, UserError
from vlm_jax.config.hints import nearest
from vlm_jax.config.validate import kinds
from vlm_jax.infer.evaluate import SCORES
from vlm_jax.study.changes import Differences, changed, is_placeholder
from vlm_jax.study.matching import AXES

LONGEST_LINES = 60  # of a study file: what is longer is no longer a question and a few differences
QUICK_SEEDS = 1
KINDS = {  # field -> what it must be, and how that is called
    "question": (str, "a text"),
    "base": (Experiment, "an Experiment"),
    **dict.fromkeys(("arms", "matched", "quick", "first"), (Mapping, "a dict")),
    "reference": (str, "the name of an arm"),
    "tolerance": (float | int, "a number"),
    "seeds": (int, "a whole number"),
    "metric": (str, "the name of a score"),
}


@dataclass(frozen=True)
class Study:
    """A question and what answers it.

    An arm is the base with a few fields changed. In every axis of `matched` all arms are made equal to the reference:
    the field that the axis names is solved for, or, where it names none, they must be equal already.
    """

    question: str
    base: Experiment
    arms: Mapping[str, Differences]
    matched: Mapping[str, str]  # axis of `matching.AXES` -> the field that is solved for; "": none
    reference: str  # the arm that others are matched to and compared with
    tolerance: float = 0.02  # the largest share by which an arm may miss the reference on an axis
    seeds: int = 3
    metric: str = "exact_match"  # a score of eval.json; by_type.NAME: of the questions of one type
    quick: Differences = field(default_factory=dict)  # of --quick, over those of the arms
    first: Mapping[str, Differences] = field(
        default_factory=dict
    )  # runs that arms build on: "{name}" is their export


def load(path: str) -> Study:
    """The study of a file: what its `get_study()` returns.

    Raises:
      ConfigError: no such file, or one that is too long or does not define a study that can be run.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        others = [str(one) for one in files(file.parent)] if file.parent.is_dir() else []
        hint = nearest(str(path), others) or (f": there are {', '.join(others)}" if others else "")
        raise ConfigError(f"study {path} is no Python file{hint}.")
    lines = len(file.read_text(errors="replace").splitlines())
    if lines > LONGEST_LINES:
        raise ConfigError(
            f"study {path} has {lines} lines: at most {LONGEST_LINES} hold a question, a base and a few differences."
        )
    try:
        get_study = getattr(_module(file), "get_study", None)
        study = get_study() if get_study else None
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"study {path} could not be loaded: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(study, Study):
        raise ConfigError(f"study {path} has no get_study() that returns a vlm_jax.study.Study.")
    try:
        return check(study)
    except UserError as error:
        raise ConfigError(f"study {path}: {error}") from None


def files(folder: Path) -> list[Path]:
    """The Python files of a folder that define a study."""
    return [
        file
        for file in sorted(folder.glob("*.py"))
        if "def get_study" in file.read_text(errors="replace")
    ]


def _module(file: Path):
    spec = importlib.util.spec_from_file_location(f"vlm_jax_study_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(study: Study) -> Study:
    """Returns the study as it came.

    Raises:
      ConfigError: a name, a field, an axis or a number that cannot be; which experiments cannot work is known later.
    """
    for name, (kind, called) in KINDS.items():
        _check_kind(name, getattr(study, name), kind, called)
    for where, values in _all_differences(study).items():
        _check_kind(where, values, Mapping, "a dict of fields and values")
    if not study.base.eval.read_split:
        raise ConfigError(
            "base has no eval.split: the arms are compared by what they answer in it."
        )
    if len(study.arms) < 2:
        raise ConfigError(f"arms has {len(study.arms)} entries: a comparison needs 2.")
    for name in (*study.arms, *study.first):
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
            raise ConfigError(
                f"the name {name!r} is to be a folder: use letters, digits and . _ + - only."
            )
    _one_of(study.reference, study.arms, "reference", "arm")
    if not study.matched:
        raise ConfigError(f"matched names no axis: choose among {', '.join(AXES)}.")
    for axis, free in study.matched.items():
        _one_of(axis, AXES, "matched", "axis")
        _check_free(study, axis, free)
    for where, differences in _all_differences(study).items():
        _check_differences(study, where, differences)
    if study.seeds < 1:
        raise ConfigError(f"seeds is {study.seeds}: it must be at least 1.")
    if not 0 <= study.tolerance < 1:
        raise ConfigError(f"tolerance is {study.tolerance}: it is a share, from 0 to less than 1.")
    if study.metric not in SCORES and not study.metric.startswith("by_type."):
        raise ConfigError(
            f"metric {study.metric!r} is none: choose {', '.join(SCORES)} or by_type.NAME."
        )
    return study


def _check_kind(name: str, value, kind, called: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r}: it must be {called}.")


def _one_of(name: str, choices: Iterable[str], where: str, what: str) -> None:
    if name not in choices:
        raise ConfigError(
            f"{where} {name!r} is no {what}{nearest(name, choices)}: choose {', '.join(choices)}."
        )


def _check_free(study: Study, axis: str, free: str) -> None:
    known = kinds(study.base)
    if free and known.get(free) is not int:
        numbers = [name for name, kind in known.items() if kind is int]
        raise ConfigError(
            f"matched {axis} solves for {free!r}, no field of a whole number{nearest(free, numbers)}."
        )
    if axis == "seconds" and study.first:
        raise ConfigError(
            "matched seconds are measured before anything is trained: they cannot be with `first`."
        )
    if axis == "seconds" and free != "train.steps":
        raise ConfigError(f"matched seconds can be solved for train.steps alone, not for {free!r}.")


def _all_differences(study: Study) -> dict[str, Differences]:
    named = {f"arm {name}": differences for name, differences in study.arms.items()}
    return (
        named
        | {f"first {name}": differences for name, differences in study.first.items()}
        | {"quick": study.quick}
    )


def _check_differences(study: Study, where: str, differences: Differences) -> None:
    try:
        changed(study.base, differences)
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from None
    for name, value in differences.items():
        if name in ("workdir", "seed"):
            raise ConfigError(f"{where}: {name} is set by the study.")
        if is_placeholder(value) and value[1:-1] not in study.first:
            raise ConfigError(
                f"{where}: {name} {value} names no run of `first`{nearest(value[1:-1], study.first)}."
            )
