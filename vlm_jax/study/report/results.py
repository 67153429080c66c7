"""Results of the finished runs of a study."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlm_jax.config import ConfigError, UserError
from vlm_jax.infer.metrics.scores import metric_keys, parse_score
from vlm_jax.infer.metrics.table import of_attention
from vlm_jax.runtime.workdir import EvaluationFolder, Workdir
from vlm_jax.study.planning import Plan, Probe, Run, resolve_checkpoints
from vlm_jax.study.run import record, running
from vlm_jax.train import log

ANSWER_FIELDS = {"image_id", "question", "type", "answer", "prediction", "correct"}
METRIC_FIELDS = {"step", "loss", "step_seconds"}


@dataclass(frozen=True)
class Result:
    """A finished run."""

    score: float  # the study's metric
    shuffled_score: float  # the same metric with shuffled images
    by_type: Mapping[str, float]
    predictions: tuple[Mapping[str, object], ...]  # lines of predictions.jsonl
    metrics: tuple[Mapping[str, float], ...]  # lines of metrics.jsonl without validations
    record: Mapping[str, object]
    #: metric of attention -> layer -> name of a number -> its mean
    by_layer: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    scores: Mapping[str, object] = field(default_factory=dict)  # eval.json
    probes: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # of each probe

    @functools.cached_property
    def questions(self) -> list[tuple]:
        """(image id, question, answer) of every test question."""
        return [(line["image_id"], line["question"], line["answer"]) for line in self.predictions]

    def answers(self, metric: str) -> list[Mapping[str, object]]:
        """Returns the lines of predictions.jsonl that a metric averages: all, or one type's."""
        question_type = parse_score(metric).type
        return [line for line in self.predictions if question_type in (None, line["type"])]

    def answer_values(self, metric: str) -> list[float] | None:
        """Returns the metric of every answer that it averages; None where answers have none."""
        score = parse_score(metric)
        field = metric_keys(score.metric).example
        lines = self.answers(metric)
        if score.is_shuffled or not lines or any(field not in line for line in lines):
            return None
        return [float(line[field]) for line in lines]


@dataclass(frozen=True)
class Results:
    """Results of all runs of a plan."""

    plan: Plan
    finished: Mapping[tuple[str, str, int], Result]  # key: axis, arm, seed
    missing: Mapping[str, str]  # name of an unfinished run -> reason
    broken: Mapping[str, str]  # name of a finished run that cannot be read -> reason

    def by_seed(self, axis: str, arm: str) -> dict[int, Result]:
        """Returns seed -> result of an arm on an axis."""
        return {
            seed: result
            for (result_axis, result_arm, seed), result in self.finished.items()
            if (result_axis, result_arm) == (axis, arm)
        }

    def scores(self, axis: str, arm: str) -> dict[int, float]:
        """Returns seed -> score of an arm on an axis."""
        return {seed: result.score for seed, result in self.by_seed(axis, arm).items()}

    def other_scores(
        self, axis: str, arm: str, name: str, probe: str | None = None
    ) -> dict[int, float]:
        """Returns seed -> another score than the study's metric, by its key in eval.json.

        Args:
          probe: whose score it is; None: of the evaluation after the training.

        Raises:
          ConfigError: an evaluation has no such score.
        """
        scores = {}
        for seed, result in self.by_seed(axis, arm).items():
            where = f"the evaluation of {axis}/{arm}/seed_{seed}"
            if probe is not None:
                where = f"probe {probe} of {axis}/{arm}/seed_{seed}"
            evaluation = result.scores if probe is None else result.probes[probe]
            scores[seed] = _score(evaluation, name, where)
        return scores


def read_results(plan: Plan) -> Results:
    """Reads every finished run, once even if it serves several axes."""
    by_run: dict[Run, Result] = {}
    missing: dict[str, str] = {}
    broken: dict[str, str] = {}
    for run in plan.runs():
        if not running.is_done(run):
            missing[run.name] = _missing_reason(run)
            continue
        try:
            by_run[run] = _read_run(run, plan.study.metric)
        except UserError as error:
            broken[run.name] = str(error)
    keys = [(axis, arm, seed) for seed in range(plan.study.seeds) for axis, arm in plan.arms]
    finished = {key: by_run[plan.run(*key)] for key in keys if plan.run(*key) in by_run}
    return Results(plan, finished, missing, broken)


def _read_run(run: Run, metric: str) -> Result:
    """Raises ConfigError if the folder holds another run, or a file is missing or damaged."""
    workdir = Workdir(run.cfg.workdir)
    workdir.check(resolve_checkpoints(run.cfg))
    scores = record.read_json(workdir.eval)
    keys = metric_keys(parse_score(metric).metric)
    if not {keys.by_type, keys.shuffled} <= scores.keys():
        raise ConfigError(
            f"{workdir.eval} is damaged: it must have {keys.by_type} and {keys.shuffled}."
        )
    return Result(
        _score(scores, metric, workdir.eval),
        scores[keys.shuffled],
        scores[keys.by_type],
        _read_lines(workdir.predictions, ANSWER_FIELDS),
        _read_lines(workdir.metrics, METRIC_FIELDS, log.SECONDS),
        record.read(run.cfg.workdir),
        {name: scores[metric_keys(name).by_layer] for name in of_attention(run.cfg.eval.metrics)},
        scores,
        {probe.name: record.read_json(_probe_file(run, probe)) for probe in run.probes},
    )


def _probe_file(run: Run, probe: Probe) -> Path:
    return EvaluationFolder(run.probe_folder(probe.name)).eval


def _score(scores: Mapping, metric: str, where: str | Path) -> float:
    """Returns a score of eval.json by its key, `key` or `key.question_type`."""
    score = scores
    for name in metric.split(".", 1):
        if not isinstance(score, Mapping) or name not in score:
            raise ConfigError(f"{where} has no {metric}; its scores: {', '.join(_names(scores))}.")
        score = score[name]
    return score


def _names(scores: Mapping) -> list[str]:
    """Returns the names of all scores of eval.json, as a study's metric has them."""
    names = []
    for key, value in scores.items():
        if isinstance(value, float):
            names.append(key)
        if isinstance(value, Mapping):
            names += [f"{key}.{name}" for name in value if isinstance(value[name], float)]
    return names


def _read_lines(file: Path, fields: set[str], other: str | None = None) -> tuple[dict, ...]:
    """Returns the objects of a JSON lines file, which must have at least these fields.

    Objects with the field `other` are left out.
    """
    lines = record.parse_file(file, lambda text: tuple(map(json.loads, text.splitlines())))
    lines = tuple(line for line in lines if not (isinstance(line, dict) and other in line))
    if not lines or not all(isinstance(line, dict) and fields <= line.keys() for line in lines):
        raise ConfigError(
            f"{file} is damaged: it must have lines, each with {', '.join(sorted(fields))}."
        )
    return lines


def _missing_reason(run: Run) -> str:
    try:
        attempts = record.read(run.cfg.workdir)
    except UserError as error:
        return str(error)
    if attempts.get("error"):
        return f"failed: {attempts['error']}"
    return "stopped, to be continued" if Path(run.cfg.workdir).exists() else "not run yet"
