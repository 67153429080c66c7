"""The definition of a study, and the Python file that holds it."""

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlm_jax.config import ConfigError, Experiment, UserError
from vlm_jax.config.hints import nearest
from vlm_jax.config.model import PRETRAINED_PARTS
from vlm_jax.config.validate import flat, kinds
from vlm_jax.infer.metrics.intervals import Bounds
from vlm_jax.infer.metrics.scores import (
    all_numbers,
    metric_of,
    parse_score,
    score_bounds,
    score_names,
)
from vlm_jax.infer.metrics.table import METRICS, check_metrics
from vlm_jax.study.changes import Overrides, is_placeholder, override
from vlm_jax.study.contrasts import MAX_CONTRASTS, SIGNS, Contrast, Term, parse_sum
from vlm_jax.study.matching import AXES

# A study file holds a question, overrides and contrasts: anything longer belongs elsewhere.
MAX_LINES = 90
QUICK_SEEDS = 1
# Everything that is chosen by a score is chosen on this split.
SPLIT_OF_CHOICES = "validation"
# Field -> its type, and the words for it in a message.
FIELD_TYPES = {
    "question": (str, "a string"),
    "base": (Experiment, "an Experiment"),
    **dict.fromkeys(
        ("arms", "matched", "quick", "prerequisites", "probes", "contrasts", "tune"),
        (Mapping, "a dict"),
    ),
    "reference": (str, "the name of an arm"),
    "tolerance": (float | int, "a number"),
    "seeds": (int, "an integer"),
    "loss_threshold": (float | int | None, "a number of nats, or None"),
    "metric": (str, "the name of a score"),
}
PREREQUISITE = "a dict of fields and values, or several that the seeds take in turn"


@dataclass(frozen=True)
class Study:
    """A question and the arms that answer it.

    An arm overrides a few fields of the base experiment. On every axis of `matched`, all arms are
    made equal to the reference by solving for one field, or must be equal already.
    """

    question: str
    base: Experiment
    arms: Mapping[str, Overrides]
    # Axis of `matching.AXES` -> the integer field to solve for; None: arms must be equal already.
    matched: Mapping[str, str | None]
    # The arm that the others are matched to and compared with.
    reference: str
    # Largest relative difference from the reference on an axis.
    tolerance: float = 0.02
    # Number of runs of each arm.
    seeds: int = 3
    # A score of eval.json; by_type.NAME: the score of one type of question.
    metric: str = "exact_match"
    # Name -> a difference of arms with its published sign, named before any run: the only ones
    # that are tested.
    contrasts: Mapping[str, Contrast] = field(default_factory=dict)
    # Nats of the smoothed training loss to which the time of each arm is reported.
    loss_threshold: float | None = None
    # Overrides of --quick, applied on top of the arms' overrides.
    quick: Overrides = field(default_factory=dict)
    # Runs that each seed trains first, for all of its arms; in an arm, `decoder.checkpoint`
    # "{name}" is the run of its seed. The seeds take several versions of a run in turn.
    prerequisites: Mapping[str, Overrides | Sequence[Overrides]] = field(default_factory=dict)
    # Arm -> candidates for the fields of `optim`, of which a sweep chooses one (`tuning.py`).
    tune: Mapping[str, Sequence[Overrides]] = field(default_factory=dict)
    # Other questions that every finished run is asked: name -> overrides of data, eval and
    # fusion.kind.
    probes: Mapping[str, Overrides] = field(default_factory=dict)

    def versions(self, prerequisite: str) -> tuple[Overrides, ...]:
        """Returns the versions of a prerequisite, which the seeds take in turn."""
        overrides = self.prerequisites[prerequisite]
        return (overrides,) if isinstance(overrides, Mapping) else tuple(overrides)

    @property
    def shares_parts(self) -> bool:
        """True if the arms of a seed start from the same pretrained parts."""
        return bool(self.prerequisites)

    @property
    def metric_bounds(self) -> Bounds:
        """Lowest and highest possible score."""
        return score_bounds(self.metric)

    @property
    def higher_is_better(self) -> bool:
        return METRICS[metric_of(parse_score(self.metric).metric)].higher_is_better


def load(path: str) -> Study:
    """Returns the study that a file's `get_study()` returns.

    Raises:
      ConfigError: the file does not exist, is too long, or does not define a valid study.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise ConfigError(f"study {path} is not a Python file{_hint_file(file)}.")
    lines = len(file.read_text(errors="replace").splitlines())
    if lines > MAX_LINES:
        raise ConfigError(
            f"study {path} has {lines} lines, but at most {MAX_LINES} are allowed: "
            "a question, overrides and contrasts."
        )
    try:
        get_study = getattr(_import_file(file), "get_study", None)
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


def _hint_file(file: Path) -> str:
    studies = [str(path) for path in study_files(file.parent)] if file.parent.is_dir() else []
    hint = nearest(str(file), studies)
    if hint or not studies:
        return hint
    return f": choose {', '.join(studies)}"


def study_files(folder: Path) -> list[Path]:
    """Returns the Python files of a folder that define a study."""
    return [
        file
        for file in sorted(folder.glob("*.py"))
        if "def get_study" in file.read_text(errors="replace")
    ]


def _import_file(file: Path):
    spec = importlib.util.spec_from_file_location(f"vlm_jax_study_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(study: Study) -> Study:
    """Returns the study unchanged; experiments that cannot work are found in planning.

    Raises:
      ConfigError: a name, field, axis or number is invalid.
    """
    for name, (field_type, words) in FIELD_TYPES.items():
        _check_type(name, getattr(study, name), field_type, words)
    for name, overrides in study.prerequisites.items():
        _check_type(f"prerequisite {name}", overrides, Mapping | list | tuple, PREREQUISITE)
    for where, overrides in _all_overrides(study).items():
        _check_type(where, overrides, Mapping, "a dict of fields and values")
    if not study.base.eval.read_split:
        raise ConfigError("base has no eval.split, on which the arms are compared.")
    if len(study.arms) < 2:
        raise ConfigError(f"arms has {len(study.arms)} entries, but a comparison needs 2.")
    for name in (*study.arms, *study.prerequisites, *study.probes):
        _check_name(name)
    _check_choice(study.reference, study.arms, "reference", "an arm")
    if not study.matched:
        raise ConfigError(f"matched has no axis: choose from {', '.join(AXES)}.")
    for axis, solved_field in study.matched.items():
        _check_choice(axis, AXES, "matched", "an axis")
        _check_solved_field(study, axis, solved_field)
    for where, overrides in _all_overrides(study).items():
        _check_overrides(study, where, overrides)
    for name, value in flat(study.base).items():
        if is_placeholder(value):
            _check_placeholder(study, "base", name, value)
    _check_patience(study)
    if study.seeds < 1:
        raise ConfigError(f"seeds is {study.seeds}, but must be at least 1.")
    if not 0 <= study.tolerance < 1:
        raise ConfigError(f"tolerance is {study.tolerance}, but must be in [0, 1).")
    check_metrics(study.base.eval.metrics, "eval.metrics")
    _check_score(study.metric, study.base.eval.metrics, "metric")
    _check_probes(study)
    _check_tune(study)
    _check_contrasts(study)
    return study


def _check_type(name: str, value, field_type, words: str) -> None:
    if not isinstance(value, field_type):
        raise ConfigError(f"{name} is {value!r}, but must be {words}.")


def _check_name(name) -> None:
    """Names of arms and prerequisites are names of folders."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise ConfigError(f"invalid name {name!r}: use letters, digits, '.', '_', '+', '-'.")


def _check_choice(name: str, choices: Iterable[str], where: str, words: str) -> None:
    if name not in choices:
        raise ConfigError(
            f"{where} {name!r} is not {words}{nearest(name, choices)}: choose {', '.join(choices)}."
        )


def _check_solved_field(study: Study, axis: str, name: str | None) -> None:
    if axis == "seconds" and study.prerequisites:
        raise ConfigError(
            "matched seconds are measured before any training, so that a study with "
            "prerequisites cannot match them."
        )
    if axis == "seconds" and name != "train.steps":
        raise ConfigError(f"matched seconds can only be solved for train.steps, not for {name!r}.")
    if name is None:
        return
    fields = kinds(study.base)
    if fields.get(name) is not int:
        integers = [field_name for field_name, kind in fields.items() if kind is int]
        raise ConfigError(
            f"matched {axis} is solved for {name!r}, which is not an integer field"
            f"{nearest(str(name), integers)} (None: the arms must be equal already)."
        )


def _all_overrides(study: Study) -> dict[str, Overrides]:
    """Returns the place of overrides in the study, as a message names it -> overrides."""
    arms = {f"arm {name}": overrides for name, overrides in study.arms.items()}
    probes = {f"probe {name}": overrides for name, overrides in study.probes.items()}
    prerequisites = {}
    for name in study.prerequisites:
        for i, overrides in enumerate(study.versions(name)):
            prerequisites[f"prerequisite {name}{f' ({i})' if i else ''}"] = overrides
    return arms | probes | prerequisites | {"quick": study.quick}


def _check_overrides(study: Study, where: str, overrides: Overrides) -> None:
    try:
        override(study.base, overrides)
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from None
    for name, value in overrides.items():
        if name in ("workdir", "seed"):
            raise ConfigError(f"{where}: {name} is set by the study.")
        if is_placeholder(value):
            _check_placeholder(study, where, name, value)


def _check_placeholder(study: Study, where: str, name: str, value: str) -> None:
    if value[1:-1] not in study.prerequisites:
        raise ConfigError(
            f"{where}: {name} {value} is not a prerequisite"
            f"{nearest(value[1:-1], study.prerequisites)}."
        )
    fields = [f"{part}.checkpoint" for part in PRETRAINED_PARTS]
    if name not in fields or where.startswith("prerequisite"):
        raise ConfigError(
            f"{where}: {name} {value} cannot be a prerequisite: only {', '.join(fields)} of arms "
            "can."
        )


def _check_probes(study: Study) -> None:
    """Refuses a probe that changes more than the questions."""
    for name, overrides in study.probes.items():
        for field_name, value in overrides.items():
            asks_text = (field_name, value) == ("fusion.kind", "text_only")
            if not (asks_text or field_name.startswith(("data.", "eval."))):
                raise ConfigError(
                    f"probe {name} changes {field_name} to {value!r}, but the run is trained: only "
                    "fields of data and eval can change, and fusion.kind to text_only."
                )
        metrics = _probe_metrics(study, name)
        check_metrics(metrics, f"probe {name}: eval.metrics")
        _check_score(study.metric, metrics, f"probe {name}: metric")


def _probe_metrics(study: Study, name: str) -> tuple[str, ...]:
    return study.probes[name].get("eval.metrics", study.base.eval.metrics)


def _check_patience(study: Study) -> None:
    """Refuses early stopping, which gives arms different numbers of steps."""
    values = [overrides.get("train.patience") for overrides in _all_overrides(study).values()]
    for patience in (study.base.train.patience, *values):
        if patience is not None:
            raise ConfigError(
                f"train.patience {patience} would end the arms after different numbers of steps, "
                "so that they are not matched: leave it out."
            )


def _check_score(name: str, metrics: Iterable[str], where: str) -> None:
    score = parse_score(name)
    if score is None:
        raise ConfigError(
            f"{where} {name!r} does not exist{nearest(name, score_names())}: choose "
            "NAME, image_shuffled_NAME or NAME_by_type.TYPE (by_type.TYPE of exact_match), with "
            f"NAME one of {', '.join(all_numbers())}."
        )
    metric = metric_of(score.metric)
    if metric not in metrics:
        raise ConfigError(f"{where} {name} needs {metric} in eval.metrics: add it.")


def _check_tune(study: Study) -> None:
    """Refuses a choice by the scores of the split that the study reports."""
    if study.tune and study.base.eval.read_split == SPLIT_OF_CHOICES:
        raise ConfigError(
            f"tune chooses on the split {SPLIT_OF_CHOICES}, which is also eval.split: report the "
            "arms on another, such as test."
        )
    for arm, candidates in study.tune.items():
        _check_choice(arm, study.arms, "tune", "an arm")
        _check_type(f"tune of arm {arm}", candidates, list | tuple, "a list of dicts")
        if not candidates:
            raise ConfigError(f"tune of arm {arm} has no candidates.")
        for candidate in candidates:
            _check_type(f"tune of arm {arm}", candidate, Mapping, "a list of dicts")
            _check_overrides(study, f"tune of arm {arm}", candidate)
            _check_candidate(arm, candidate)


def _check_candidate(arm: str, candidate: Overrides) -> None:
    for name, value in candidate.items():
        if not name.startswith("optim."):
            raise ConfigError(
                f"tune of arm {arm} sets {name} to {value!r}, but chooses fields of optim alone, "
                f"on the split {SPLIT_OF_CHOICES}: the test split is for the final number."
            )


def _check_contrasts(study: Study) -> None:
    if len(study.contrasts) > MAX_CONTRASTS:
        raise ConfigError(
            f"contrasts has {len(study.contrasts)} entries, but at most {MAX_CONTRASTS} are "
            "tested: leave the others to the pairs of the report."
        )
    for name, contrast in study.contrasts.items():
        try:
            _check_contrast(study, contrast)
        except UserError as error:
            raise ConfigError(f"contrast {name}: {error}") from None


def _check_contrast(study: Study, contrast: Contrast) -> None:
    _check_type("it", contrast, Contrast, "a vlm_jax.study.Contrast")
    _check_choice(contrast.published, SIGNS, "published", "a sign")
    if contrast.axis is not None:
        _check_choice(contrast.axis, study.matched, "axis", "matched")
    if not contrast.source:
        raise ConfigError("source is empty: name the paper and the table.")
    if (contrast.margin is not None) != (contrast.published == "= 0"):
        raise ConfigError(
            f"margin is {contrast.margin}, but it is the largest difference that counts as equal: "
            "'= 0' needs one, and no other sign."
        )
    if contrast.margin is not None and not contrast.margin > 0:
        raise ConfigError(f"margin is {contrast.margin}, but must be above 0.")
    terms = parse_sum(contrast.sum)
    for term in terms:
        _check_term(study, term)
    total = sum(term.coefficient for term in terms)
    if abs(total) > 1e-9:
        raise ConfigError(
            f"the coefficients of {contrast.sum!r} add up to {total:g}, but must add up to 0."
        )
    if len({metric_of(parse_score(term.score or study.metric).metric) for term in terms}) > 1:
        raise ConfigError(f"{contrast.sum!r} compares scores of several metrics: choose one.")


def _check_term(study: Study, term: Term) -> None:
    _check_choice(term.arm, study.arms, "the sum's", "an arm")
    metrics = study.base.eval.metrics
    if term.probe is not None:
        _check_choice(term.probe, study.probes, "the sum's", "a probe")
        metrics = _probe_metrics(study, term.probe)
    _check_score(term.score or study.metric, metrics, "score")
