"""What the runs of a study left behind."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm_jax.config import ConfigError, UserError
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.study.planning import Plan, Run, resolved
from vlm_jax.study.run import record, running


@dataclass(frozen=True)
class Result:
    """Of a finished run."""

    score: float  # the study's metric
    blind: float  # exact match with shuffled images
    by_type: Mapping[str, float]
    predictions: tuple[Mapping[str, object], ...]  # a line of predictions.jsonl each
    metrics: tuple[Mapping[str, float], ...]  # a line of metrics.jsonl each
    record: Mapping[str, object]

    @functools.cached_property
    def asked(self) -> list[tuple]:
        """The questions, to see whether two runs were asked the same."""
        return [(line["image_id"], line["question"], line["answer"]) for line in self.predictions]


@dataclass(frozen=True)
class Results:
    """Of all runs."""

    plan: Plan
    found: Mapping[tuple[str, str, int], Result]  # axis, arm, seed
    missing: Mapping[str, str]  # name of a run -> why there is nothing of it
    broken: Mapping[str, str]  # name of a finished run -> what it lacks

    def of(self, axis: str, arm: str) -> dict[int, Result]:
        """Seed -> result."""
        return {
            seed: result
            for (one, other, seed), result in self.found.items()
            if (one, other) == (axis, arm)
        }

    def scores(self, axis: str, arm: str) -> dict[int, float]:
        return {seed: result.score for seed, result in self.of(axis, arm).items()}


def read(plan: Plan) -> Results:
    """Reads every run that is done; a run that answers on several axes stands for all of them."""
    read_once: dict[Run, Result] = {}
    missing, broken = {}, {}
    for run in plan.runs():
        if not running.is_done(run):
            missing[run.name] = _why_missing(run)
            continue
        try:
            read_once[run] = _read(run, plan.study.metric)
        except UserError as error:
            broken[run.name] = str(error)
    wanted = [(axis, arm, seed) for seed in range(plan.study.seeds) for axis, arm in plan.arms]
    found = {key: read_once[plan.run(*key)] for key in wanted if plan.run(*key) in read_once}
    return Results(plan, found, missing, broken)


def _read(run: Run, metric: str) -> Result:
    """Raises ConfigError where a finished run is not this one, or a file of it is missing or damaged."""
    workdir = Workdir(run.cfg.workdir)
    workdir.check(resolved(run.cfg))
    scores = score = record.read_json(workdir.eval)
    if not {"by_type", "image_shuffled_exact_match"} <= scores.keys():
        raise ConfigError(
            f"{workdir.eval} is damaged: it must have by_type and image_shuffled_exact_match."
        )
    for name in metric.split(".", 1):
        if not isinstance(score, Mapping) or name not in score:
            raise ConfigError(
                f"{workdir.eval} has no {metric}: it has {', '.join(_numbers(scores))}."
            )
        score = score[name]
    predictions = _lines(
        workdir.predictions, {"image_id", "question", "type", "answer", "prediction", "correct"}
    )
    metrics = _lines(workdir.metrics, {"step", "loss", "step_seconds"})
    blind, by_type = scores["image_shuffled_exact_match"], scores["by_type"]
    return Result(score, blind, by_type, predictions, metrics, record.read(run.cfg.workdir))


def _lines(file: Path, fields: set[str]) -> tuple[dict, ...]:
    """An object a line, each with at least these fields."""
    lines = record.parsed(file, lambda text: tuple(map(json.loads, text.splitlines())))
    if not lines or not all(isinstance(line, dict) and fields <= line.keys() for line in lines):
        raise ConfigError(
            f"{file} is damaged: it must have lines, each with {', '.join(sorted(fields))}."
        )
    return lines


def _numbers(scores: Mapping) -> list[str]:
    nested = [f"by_type.{name}" for name in scores.get("by_type", {})]
    return [name for name, value in scores.items() if isinstance(value, float)] + nested


def _why_missing(run: Run) -> str:
    try:
        known = record.read(run.cfg.workdir)
    except UserError as error:
        return str(error)
    if known.get("error"):
        return f"failed: {known['error']}"
    return "stopped, to be continued" if Path(run.cfg.workdir).exists() else "not run yet"
