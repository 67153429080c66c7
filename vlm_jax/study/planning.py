"""The experiments of a study: matched, and in the order in which they run."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_jax.config import ConfigError, Experiment, Lora, Optim, UserError
from vlm_jax.config.model import PRETRAINED_PARTS
from vlm_jax.config.validate import flat, validate
from vlm_jax.hub import pretrained_parts
from vlm_jax.infer.metrics.scores import check_attention
from vlm_jax.study import matching
from vlm_jax.study.changes import Overrides, fill_placeholders, is_placeholder, override
from vlm_jax.study.definition import Study
from vlm_jax.study.matching import Match

# Folder of the prerequisites, in the folder of a study and in the names of study.json.
PREREQUISITES = "first"


@dataclass(frozen=True, eq=False)
class Probe:
    """Other questions for the finished runs: overrides of their experiments."""

    name: str
    overrides: Overrides


@dataclass(frozen=True)
class Run:
    """An arm with a seed, matched on an axis: an ordinary run in its own work folder."""

    axis: str
    arm: str
    seed: int
    cfg: Experiment
    probes: tuple[Probe, ...] = ()
    prerequisites: tuple[str, ...] = ()  # work folders of the runs that it starts from

    @property
    def name(self) -> str:
        return f"{self.axis}/{self.arm}/seed_{self.seed}"

    def probe_folder(self, probe: str) -> Path:
        """Returns the folder of the answers to the questions of a probe."""
        return Path(self.cfg.workdir) / "probes" / probe


@dataclass(frozen=True)
class Plan:
    """A study in a folder."""

    study: Study
    folder: Path
    # Name -> its versions, without seed and work folder.
    prerequisites: Mapping[str, tuple[Experiment, ...]]
    # (axis, arm) -> the matched experiment, without seed and work folder, with placeholders.
    arms: Mapping[tuple[str, str], Experiment]
    matches: tuple[Match, ...]
    probes: tuple[Probe, ...] = ()
    # With the few steps of `Study.quick`, whose scores answer nothing.
    quick: bool = False

    def run(self, axis: str, arm: str, seed: int) -> Run:
        """Returns the run of an arm; axes with the same experiment share the run of the first."""
        cfg = self.arms[axis, arm]
        axis = next(other for other in self.study.matched if self.arms[other, arm] == cfg)
        folders = {name: self._workdir(PREREQUISITES, name, seed) for name in self.prerequisites}
        used = filter(is_placeholder, dict.fromkeys(_checkpoints(cfg)))
        prerequisites = tuple(str(folders[checkpoint[1:-1]]) for checkpoint in used)
        cfg = self._seeded(fill_placeholders(cfg, folders), axis, arm, seed)
        return Run(axis, arm, seed, cfg, self.probes, prerequisites)

    def prerequisite(self, name: str, seed: int) -> Run:
        """Returns the run that the arms of a seed start from."""
        versions = self.prerequisites[name]
        cfg = self._seeded(versions[seed % len(versions)], PREREQUISITES, name, seed)
        return Run(PREREQUISITES, name, seed, cfg)

    def _seeded(self, cfg: Experiment, axis: str, arm: str, seed: int) -> Experiment:
        workdir = str(self._workdir(axis, arm, seed))
        return replace(cfg, seed=cfg.seed + seed, workdir=workdir)

    def _workdir(self, axis: str, arm: str, seed: int) -> Path:
        return self.folder / axis / arm / f"seed_{seed}"

    def runs(self) -> list[Run]:
        """Returns every run once.

        The first seed of all arms precedes the second of any, so that a stopped study compares all.
        """
        keys = [(axis, arm, seed) for seed in range(self.study.seeds) for axis, arm in self.arms]
        return list(dict.fromkeys(self.run(*key) for key in keys))

    def prerequisites_of(self, runs: Iterable[Run]) -> list[Run]:
        """Returns the runs that these start from, in the order of their seeds."""
        seeds = dict.fromkeys(run.seed for run in runs)
        return [self.prerequisite(name, seed) for seed in seeds for name in self.prerequisites]

    def models(self) -> dict[str, Experiment]:
        """Returns one experiment for each model whose costs are measured, by name.

        Experiments that differ in their number of steps share a model, which has the arm's name.
        """
        models: dict[str, Experiment] = {}
        for (axis, arm), cfg in self.arms.items():
            models.setdefault(self.model_name(axis, arm), cfg)
        return models

    def resolve(self, cfg: Experiment) -> Experiment:
        """Returns the experiment with the settings of the checkpoints that it starts from."""
        return resolve_parts(cfg, self.prerequisites)

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


def unmatched_arms(study: Study, quick: bool) -> dict[str, Experiment]:
    """Returns the experiment of every arm before it is matched, with placeholders.

    Raises:
      ConfigError: an experiment is invalid.
    """
    return {
        name: _experiment(study, f"arm {name}", overrides, quick)
        for name, overrides in study.arms.items()
    }


def resolve_checkpoints(cfg: Experiment) -> Experiment:
    """Returns the experiment with the settings of the checkpoints that it starts from."""
    return pretrained_parts.resolve_checkpoints(cfg) if cfg.begins_with_any else cfg


_resolve_checkpoints_once = functools.cache(resolve_checkpoints)


def resolve_parts(
    cfg: Experiment, prerequisites: Mapping[str, tuple[Experiment, ...]]
) -> Experiment:
    """Returns the experiment with the settings of its checkpoints, of which those that are
    placeholders exist only after the prerequisites are trained.
    """
    for part in PRETRAINED_PARTS:
        section = getattr(cfg, part)
        if not is_placeholder(section.checkpoint):
            continue
        source = _resolve_checkpoints_once(prerequisites[section.checkpoint[1:-1]][0])
        own_fields = {
            name: getattr(section, name) for name in pretrained_parts.EXPERIMENT_FIELDS[part]
        }
        section = replace(getattr(source, part), checkpoint="", **own_fields)
        cfg = replace(cfg, **{part: section})
    return _resolve_checkpoints_once(cfg)


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
    unmatched = unmatched_arms(study, quick)
    prerequisites = _prerequisites(study, quick)
    _check_parts(study, unmatched, prerequisites)
    arms: dict[tuple[str, str], Experiment] = {}
    matches: list[Match] = []
    for axis, field in study.matched.items():
        reference_value = _axis_value(axis, step_seconds.get(study.reference), prerequisites)
        target = reference_value(unmatched[study.reference])
        for arm, cfg in unmatched.items():
            value = _axis_value(axis, step_seconds.get(arm), prerequisites)
            matched = _solve(axis, arm, cfg, field, value, target) if field else cfg
            number = flat(matched)[field] if field else None
            arms[axis, arm] = matched
            matches.append(Match(axis, arm, field, number, value(matched), target))
        _reject_equal_arms(axis, {arm: arms[axis, arm] for arm in unmatched}, prerequisites)
    matching.check(matches, float("inf") if quick else study.tolerance)
    probes = _probes(study, quick)
    plan = Plan(study, folder, prerequisites, arms, tuple(matches), probes, quick)
    _check_probes(plan)
    return plan


def _prerequisites(study: Study, quick: bool) -> dict[str, tuple[Experiment, ...]]:
    experiments = {}
    for name in study.prerequisites:
        where = f"prerequisite {name}"
        versions = [_experiment(study, where, version, quick) for version in study.versions(name)]
        for version in versions:
            if not version.eval.read_split:
                raise ConfigError(f"{where} has no eval.split, by which its end is known.")
            for part in filter(is_placeholder, _checkpoints(version)):
                raise ConfigError(f"{where} starts from {part}: set its checkpoints to ''.")
        experiments[name] = tuple(versions)
    return experiments


def _checkpoints(cfg: Experiment) -> tuple[str, ...]:
    return tuple(getattr(cfg, part).checkpoint for part in PRETRAINED_PARTS)


def _check_parts(
    study: Study,
    arms: Mapping[str, Experiment],
    prerequisites: Mapping[str, tuple[Experiment, ...]],
) -> None:
    """Checks that the arms of a seed share their pretrained parts, or have new ones."""
    for part in PRETRAINED_PARTS:
        first: dict[str, str] = {}  # checkpoint -> the first arm that starts from it
        for arm, cfg in arms.items():
            checkpoint = getattr(cfg, part).checkpoint
            if checkpoint:
                first.setdefault(checkpoint, arm)
        if len(first) > 1:
            (one, arm), (other, other_arm), *_ = first.items()
            raise ConfigError(
                f"arms {arm} and {other_arm} start from different checkpoints, {part}.checkpoint "
                f"{one} and {other}: the arms of a seed must share their pretrained parts."
            )
        for checkpoint in filter(is_placeholder, first):
            _check_source(part, checkpoint, prerequisites[checkpoint[1:-1]])


def _check_source(part: str, checkpoint: str, versions: tuple[Experiment, ...]) -> None:
    sections = [getattr(version, part) for version in versions]
    if any(section != sections[0] for section in sections):
        raise ConfigError(
            f"{part}.checkpoint {checkpoint}: the versions of the prerequisite differ in {part}, "
            "which the arms take over: let them differ elsewhere."
        )
    if part != "decoder" and not all(version.fusion.has_images for version in versions):
        raise ConfigError(
            f"{part}.checkpoint {checkpoint}: the prerequisite is text_only and has no {part}."
        )


def _probes(study: Study, quick: bool) -> tuple[Probe, ...]:
    return tuple(
        Probe(name, {**overrides, **study.quick} if quick else overrides)
        for name, overrides in study.probes.items()
    )


def _check_probes(plan: Plan) -> None:
    """Checks that every arm can answer every probe."""
    for (_, arm), cfg in plan.arms.items():
        for probe in plan.probes:
            try:
                check_attention(
                    validate(probe_experiment(plan.resolve(cfg), probe, Path("probed")))
                )
            except UserError as error:
                raise ConfigError(
                    f"probe {probe.name}: arm {arm} cannot answer it: {error}"
                ) from None


def probe_experiment(cfg: Experiment, probe: Probe, workdir: Path) -> Experiment:
    """Returns the experiment that evaluates a run on the questions of a probe.

    Args:
      cfg: of the run, with the settings of its checkpoints.
      workdir: of the answers.
    """
    run = cfg.workdir
    # Nothing is trained, so that a frozen decoder may be the whole model.
    cfg = replace(cfg, init_from="", adapter="", lora=Lora(), optim=Optim(), workdir=str(workdir))
    cfg = override(cfg, probe.overrides)
    for part in PRETRAINED_PARTS:
        is_used = part == "decoder" or cfg.fusion.has_images
        section = replace(getattr(cfg, part), checkpoint=run if is_used else "")
        cfg = replace(cfg, **{part: section})
    return cfg


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
    axis: str,
    step_seconds: float | None,
    prerequisites: Mapping[str, tuple[Experiment, ...]],
) -> matching.AxisValue:
    value = matching.AXES[axis]
    if axis != "seconds":
        return lambda cfg: value(resolve_parts(cfg, prerequisites))
    if step_seconds is None:
        raise ConfigError(
            "seconds can be matched only after a step of every arm is measured: "
            "run the study first."
        )
    return functools.partial(value, step_seconds=step_seconds)


def _reject_equal_arms(
    axis: str,
    arms: Mapping[str, Experiment],
    prerequisites: Mapping[str, tuple[Experiment, ...]],
) -> None:
    names: dict[tuple, str] = {}
    for arm, cfg in arms.items():
        key = resolve_parts(cfg, prerequisites), _checkpoints(cfg)
        if key in names:
            raise ConfigError(
                f"arms {names[key]} and {arm} are identical after matching {axis}: remove one."
            )
        names[key] = arm
