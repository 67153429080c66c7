"""A study -> the experiments that answer it, matched and in the order in which they are run."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.study import matching
from vlm_jax.study.changes import Differences, changed, with_exports
from vlm_jax.study.definition import Study
from vlm_jax.study.matching import Match
from vlm_jax.validate import flat, validate


@dataclass(frozen=True)
class Run:
    """An arm with a seed, matched on an axis: an ordinary run in a work folder of its own."""

    axis: str
    arm: str
    seed: int
    cfg: Experiment

    @property
    def name(self) -> str:
        return f"{self.axis}/{self.arm}/seed_{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A study in a folder."""

    study: Study
    folder: Path
    first: Mapping[str, Experiment]  # runs that arms build on
    arms: Mapping[tuple[str, str], Experiment]  # (axis, arm) -> the matched experiment, without seed and work folder
    matches: tuple[Match, ...]

    def run(self, axis: str, arm: str, seed: int) -> Run:
        """The run that answers for an arm on an axis: where an axis before it asks for the same experiment, its run."""
        cfg = self.arms[axis, arm]
        axis = next(other for other in self.study.matched if self.arms[other, arm] == cfg)
        workdir = self.folder / axis / arm / f"seed_{seed}"
        return Run(axis, arm, seed, replace(cfg, seed=cfg.seed + seed, workdir=str(workdir)))

    def runs(self) -> list[Run]:
        """Every run once, the first seed of all arms before the second of any: a part of them is a study, too."""
        pairs = [(seed, *pair) for seed in range(self.study.seeds) for pair in self.arms]
        return list(dict.fromkeys(self.run(axis, arm, seed) for seed, axis, arm in pairs))

    def models(self) -> dict[str, Experiment]:
        """Experiments that differ in more than the number of their steps: what costs are measured of, by their names.

        An arm's own model has the arm's name.
        """
        found = {}
        for (axis, arm), cfg in self.arms.items():
            found.setdefault(self.model_name(axis, arm), cfg)
        return found

    def model_name(self, axis: str, arm: str) -> str:
        steps_alone = self.study.matched[axis] in ("", "train.steps")
        return arm if steps_alone else f"{arm}_{axis}"


def own(study: Study, folder: Path, quick: bool) -> dict[str, Experiment]:
    """Every arm's experiment before it is matched.

    Raises:
      ConfigError: one cannot work.
    """
    folders = {name: export_folder(folder, name) for name in study.first}
    overrides = study.quick if quick else {}
    return {
        name: with_exports(_valid(study, f"arm {name}", differences, overrides), folders)
        for name, differences in study.arms.items()
    }


def export_folder(folder: Path, name: str) -> Path:
    """Where the run `name` of `Study.first` is exported to."""
    return folder / "first" / f"{name}_exported"


def _valid(study: Study, where: str, differences: Differences, overrides: Differences) -> Experiment:
    try:
        return validate(changed(changed(replace(study.base, workdir=""), differences), overrides))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def plan(study: Study, folder: Path, quick: bool, step_seconds: Mapping[str, float]) -> Plan:
    """The study's experiments, matched; `step_seconds` of every arm are read where `seconds` are matched.

    A quick study shows that the runs work: its few steps cannot be matched finely, and are not asked to.

    Raises:
      ConfigError: an arm cannot work, two are equal, or one cannot be matched.
    """
    arms = own(study, folder, quick)
    found, matches = {}, []
    for axis, free in study.matched.items():
        for arm, cfg in arms.items():
            of, of_reference = (_measure(axis, step_seconds.get(name)) for name in (arm, study.reference))
            target = of_reference(arms[study.reference])
            matched = matching.solve(cfg, free, of, target) if free else cfg
            found[axis, arm] = matched
            matches.append(Match(axis, arm, free, flat(matched)[free] if free else None, of(matched), target))
        _refuse_equal(axis, {arm: found[axis, arm] for arm in arms})
    matching.check(matches, float("inf") if quick else study.tolerance)
    workdirs = folder / "first"
    first = {
        name: replace(
            _valid(study, f"first {name}", fields, study.quick if quick else {}), workdir=str(workdirs / name)
        )
        for name, fields in study.first.items()
    }
    return Plan(study, folder, first, found, tuple(matches))


def _measure(axis: str, step_seconds: float | None) -> Callable[[Experiment], float]:
    value = matching.AXES[axis]
    if axis != "seconds":
        return value
    if step_seconds is None:
        raise ConfigError("seconds are matched once a step of every arm is measured: run the study first.")
    return functools.partial(value, step_seconds=step_seconds)


def _refuse_equal(axis: str, arms: Mapping[str, Experiment]) -> None:
    seen: dict[Experiment, str] = {}
    for arm, cfg in arms.items():
        if cfg in seen:
            raise ConfigError(f"arms {seen[cfg]} and {arm} are the same experiment at matched {axis}: remove one.")
        seen[cfg] = arm
