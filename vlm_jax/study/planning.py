"""A study -> the experiments that answer it, matched and in the order in which they are run."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_jax.config import ConfigError, Decoder, Experiment, UserError
from vlm_jax.config.validate import flat, validate
from vlm_jax.hub import pretrained_parts
from vlm_jax.study import matching
from vlm_jax.study.changes import Differences, changed, with_exports
from vlm_jax.study.definition import Study
from vlm_jax.study.matching import Match


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
    arms: Mapping[
        tuple[str, str], Experiment
    ]  # (axis, arm) -> the matched experiment, without seed and work folder
    matches: tuple[Match, ...]
    quick: bool = False  # with the few steps of `Study.quick`: its scores answer nothing

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

    def built(self, cfg: Experiment) -> Experiment:
        """The experiment with the model that it trains, be that of its config or of a checkpoint."""
        return built(cfg, _decoders(self.first, self.folder))

    def model_name(self, axis: str, arm: str) -> str:
        steps_alone = self.study.matched[axis] in ("", "train.steps")
        return arm if steps_alone else f"{arm}_{axis}"


def share(runs: list[Run], number: int, count: int) -> list[Run]:
    """The `number`th of `count` shares; the seeds of an arm go to different ones, as far as there are enough.

    Were an arm always on one machine, what differs between machines would differ between arms.
    """
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(run)
    return [
        run
        for seed, some in by_seed.items()
        for i, run in enumerate(some)
        if (i + seed) % count == number - 1
    ]


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


def resolved(cfg: Experiment) -> Experiment:
    """With the settings of the checkpoints that it begins with."""
    return pretrained_parts.resolve_checkpoints(cfg) if cfg.begins_with_any else cfg


@functools.cache
def _resolved_once(cfg: Experiment) -> Experiment:
    return resolved(cfg)


def built(cfg: Experiment, decoders: Mapping[str, Decoder]) -> Experiment:
    """As `resolved`, where `decoders` are of folders that are not there before the runs."""
    if cfg.decoder.checkpoint not in decoders:
        return _resolved_once(cfg)
    own = {
        name: getattr(cfg.decoder, name) for name in pretrained_parts.EXPERIMENT_FIELDS["decoder"]
    }
    return _resolved_once(replace(cfg, decoder=replace(decoders[cfg.decoder.checkpoint], **own)))


def _decoders(first: Mapping[str, Experiment], folder: Path) -> dict[str, Decoder]:
    return {str(export_folder(folder, name)): cfg.decoder for name, cfg in first.items()}


def export_folder(folder: Path, name: str) -> Path:
    """Where the run `name` of `Study.first` is exported to."""
    return folder / "first" / f"{name}_exported"


def _valid(
    study: Study, where: str, differences: Differences, overrides: Differences
) -> Experiment:
    try:
        return validate(changed(changed(replace(study.base, workdir=""), differences), overrides))
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from None


def plan(study: Study, folder: Path, quick: bool, step_seconds: Mapping[str, float]) -> Plan:
    """The study's experiments, matched; `step_seconds` of every arm are read where `seconds` are matched.

    A quick study shows that the runs work: its few steps cannot be matched finely, and are not asked to.

    Raises:
      ConfigError: an arm cannot work, two are equal, or one cannot be matched.
    """
    arms, first = own(study, folder, quick), _first(study, folder, quick)
    decoders = _decoders(first, folder)
    found, matches = {}, []
    for axis, free in study.matched.items():
        for arm, cfg in arms.items():
            of, of_reference = (
                _measure(axis, step_seconds.get(name), decoders) for name in (arm, study.reference)
            )
            target = of_reference(arms[study.reference])
            matched = _solved(axis, arm, cfg, free, of, target) if free else cfg
            found[axis, arm] = matched
            matches.append(
                Match(axis, arm, free, flat(matched)[free] if free else None, of(matched), target)
            )
        _refuse_equal(axis, {arm: found[axis, arm] for arm in arms}, decoders)
    matching.check(matches, float("inf") if quick else study.tolerance)
    return Plan(study, folder, first, found, tuple(matches), quick)


def _first(study: Study, folder: Path, quick: bool) -> dict[str, Experiment]:
    overrides = study.quick if quick else {}
    return {
        name: replace(
            _valid(study, f"first {name}", fields, overrides), workdir=str(folder / "first" / name)
        )
        for name, fields in study.first.items()
    }


def _solved(
    axis: str, arm: str, cfg: Experiment, free: str, value: matching.Value, target: float
) -> Experiment:
    try:
        return matching.solve(cfg, free, value, target)
    except UserError as error:
        raise ConfigError(f"arm {arm} cannot be matched in {axis}: {error}") from None


def _measure(
    axis: str, step_seconds: float | None, decoders: Mapping[str, Decoder]
) -> matching.Value:
    value = matching.AXES[axis]
    if axis != "seconds":
        return lambda cfg: value(built(cfg, decoders))
    if step_seconds is None:
        raise ConfigError(
            "seconds are matched once a step of every arm is measured: run the study first."
        )
    return functools.partial(value, step_seconds=step_seconds)


def _refuse_equal(
    axis: str, arms: Mapping[str, Experiment], decoders: Mapping[str, Decoder]
) -> None:
    seen: dict[tuple, str] = {}
    for arm, cfg in arms.items():
        key = built(cfg, decoders), cfg.decoder.checkpoint
        if key in seen:
            raise ConfigError(
                f"arms {seen[key]} and {arm} are the same experiment at matched {axis}: remove one."
            )
        seen[key] = arm
