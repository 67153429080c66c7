"""The experiments of a study: matched, and in the order in which they run."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_jax.config import ConfigError, Decoder, Experiment, UserError
from vlm_jax.config.validate import flat, validate
from vlm_jax.hub import pretrained_parts
from vlm_jax.study import matching
from vlm_jax.study.changes import Overrides, fill_placeholders, override
from vlm_jax.study.definition import Study
from vlm_jax.study.matching import Match

# Folder of the prerequisites, in the folder of a study and in the names of study.json.
PREREQUISITES = "first"


@dataclass(frozen=True)
class Run:
    """An arm with a seed, matched on an axis: an ordinary run in its own work folder."""

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
    prerequisites: Mapping[str, Experiment]
    # (axis, arm) -> the matched experiment, without seed and work folder
    arms: Mapping[tuple[str, str], Experiment]
    matches: tuple[Match, ...]
    # With the few steps of `Study.quick`, whose scores answer nothing.
    quick: bool = False

    def run(self, axis: str, arm: str, seed: int) -> Run:
        """Returns the run of an arm; axes with the same experiment share the run of the first."""
        cfg = self.arms[axis, arm]
        axis = next(other for other in self.study.matched if self.arms[other, arm] == cfg)
        workdir = self.folder / axis / arm / f"seed_{seed}"
        return Run(axis, arm, seed, replace(cfg, seed=cfg.seed + seed, workdir=str(workdir)))

    def runs(self) -> list[Run]:
        """Returns every run once.

        The first seed of all arms precedes the second of any, so that a stopped study compares all.
        """
        keys = [(axis, arm, seed) for seed in range(self.study.seeds) for axis, arm in self.arms]
        return list(dict.fromkeys(self.run(*key) for key in keys))

    def models(self) -> dict[str, Experiment]:
        """Returns one experiment for each model whose costs are measured, by name.

        Experiments that differ in their number of steps share a model, which has the arm's name.
        """
        models: dict[str, Experiment] = {}
        for (axis, arm), cfg in self.arms.items():
            models.setdefault(self.model_name(axis, arm), cfg)
        return models

    def resolve_decoder(self, cfg: Experiment) -> Experiment:
        """Returns the experiment with the decoder that it trains, its own or a checkpoint's."""
        return resolve_decoder(cfg, _exported_decoders(self.prerequisites, self.folder))

    def model_name(self, axis: str, arm: str) -> str:
        same_model = self.study.matched[axis] in (None, "train.steps")
        return arm if same_model else f"{arm}_{axis}"


def shard(runs: list[Run], index: int, count: int) -> list[Run]:
    """Returns shard `index` (from 1) of `count` shards of the runs.

    The seeds of an arm go to different shards as far as possible: with an arm on one machine, a
    difference between machines would be a difference between arms.
    """
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(run)
    return [
        run
        for seed, seed_runs in by_seed.items()
        for i, run in enumerate(seed_runs)
        if (i + seed) % count == index - 1
    ]


def unmatched_arms(study: Study, folder: Path, quick: bool) -> dict[str, Experiment]:
    """Returns the experiment of every arm before it is matched.

    Raises:
      ConfigError: an experiment is invalid.
    """
    folders = {name: export_folder(folder, name) for name in study.prerequisites}
    return {
        name: fill_placeholders(_experiment(study, f"arm {name}", overrides, quick), folders)
        for name, overrides in study.arms.items()
    }


def resolve_checkpoints(cfg: Experiment) -> Experiment:
    """Returns the experiment with the settings of the checkpoints that it starts from."""
    return pretrained_parts.resolve_checkpoints(cfg) if cfg.begins_with_any else cfg


_resolve_checkpoints_once = functools.cache(resolve_checkpoints)


def resolve_decoder(cfg: Experiment, decoders: Mapping[str, Decoder]) -> Experiment:
    """Returns the experiment with the settings of its checkpoints.

    `decoders` maps checkpoint folders that exist only after the prerequisites are trained to their
    decoders.
    """
    if cfg.decoder.checkpoint not in decoders:
        return _resolve_checkpoints_once(cfg)
    names = pretrained_parts.EXPERIMENT_FIELDS["decoder"]
    own_fields = {name: getattr(cfg.decoder, name) for name in names}
    decoder = replace(decoders[cfg.decoder.checkpoint], **own_fields)
    return _resolve_checkpoints_once(replace(cfg, decoder=decoder))


def _exported_decoders(prerequisites: Mapping[str, Experiment], folder: Path) -> dict[str, Decoder]:
    return {str(export_folder(folder, name)): cfg.decoder for name, cfg in prerequisites.items()}


def export_folder(folder: Path, name: str) -> Path:
    """Returns the checkpoint folder to which a prerequisite is exported."""
    return folder / PREREQUISITES / f"{name}_exported"


def _experiment(study: Study, where: str, overrides: Overrides, quick: bool) -> Experiment:
    try:
        cfg = override(replace(study.base, workdir=""), overrides)
        return validate(override(cfg, study.quick) if quick else cfg)
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from None


def build_plan(study: Study, folder: Path, quick: bool, step_seconds: Mapping[str, float]) -> Plan:
    """Returns the matched experiments of a study.

    `step_seconds`, seconds of a step of every arm, are needed where seconds are matched. A quick
    study is not checked against the tolerance, because its few steps cannot be matched finely.

    Raises:
      ConfigError: an arm is invalid, two arms are equal, or one cannot be matched.
    """
    unmatched = unmatched_arms(study, folder, quick)
    prerequisites = _prerequisites(study, folder, quick)
    decoders = _exported_decoders(prerequisites, folder)
    arms: dict[tuple[str, str], Experiment] = {}
    matches: list[Match] = []
    for axis, field in study.matched.items():
        reference_value = _axis_value(axis, step_seconds.get(study.reference), decoders)
        target = reference_value(unmatched[study.reference])
        for arm, cfg in unmatched.items():
            value = _axis_value(axis, step_seconds.get(arm), decoders)
            matched = _solve(axis, arm, cfg, field, value, target) if field else cfg
            number = flat(matched)[field] if field else None
            arms[axis, arm] = matched
            matches.append(Match(axis, arm, field, number, value(matched), target))
        _reject_equal_arms(axis, {arm: arms[axis, arm] for arm in unmatched}, decoders)
    matching.check(matches, float("inf") if quick else study.tolerance)
    return Plan(study, folder, prerequisites, arms, tuple(matches), quick)


def _prerequisites(study: Study, folder: Path, quick: bool) -> dict[str, Experiment]:
    experiments = {}
    for name, overrides in study.prerequisites.items():
        cfg = _experiment(study, f"prerequisite {name}", overrides, quick)
        experiments[name] = replace(cfg, workdir=str(folder / PREREQUISITES / name))
    return experiments


def _solve(
    axis: str,
    arm: str,
    cfg: Experiment,
    field: str,
    value: matching.AxisValue,
    target: float,
) -> Experiment:
    try:
        return matching.solve(cfg, field, value, target)
    except UserError as error:
        raise ConfigError(f"arm {arm} cannot be matched in {axis}: {error}") from None


def _axis_value(
    axis: str, step_seconds: float | None, decoders: Mapping[str, Decoder]
) -> matching.AxisValue:
    value = matching.AXES[axis]
    if axis != "seconds":
        return lambda cfg: value(resolve_decoder(cfg, decoders))
    if step_seconds is None:
        raise ConfigError(
            "seconds can be matched only after a step of every arm is measured: "
            "run the study first."
        )
    return functools.partial(value, step_seconds=step_seconds)


def _reject_equal_arms(
    axis: str, arms: Mapping[str, Experiment], decoders: Mapping[str, Decoder]
) -> None:
    names: dict[tuple, str] = {}
    for arm, cfg in arms.items():
        key = resolve_decoder(cfg, decoders), cfg.decoder.checkpoint
        if key in names:
            raise ConfigError(
                f"arms {names[key]} and {arm} are identical after matching {axis}: remove one."
            )
        names[key] = arm
