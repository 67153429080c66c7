"""Scores of answers by chosen metrics, and their names in the files of an evaluation."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vlm_jax.config import ConfigError, DataError, Experiment
from vlm_jax.config.datasets import DATASETS
from vlm_jax.config.hints import nearest
from vlm_jax.infer.metrics import grounding
from vlm_jax.infer.metrics.grounding import Attention
from vlm_jax.infer.metrics.intervals import Bounds, Estimate
from vlm_jax.infer.metrics.loss import AnswerLoss
from vlm_jax.infer.metrics.table import METRICS, of_answers, of_attention

# Its scores have the plain keys `correct` and `by_type`.
DEFAULT_METRIC = "exact_match"
SHUFFLED = "image_shuffled_"


class Reference(NamedTuple):
    """The right answers of a question."""

    texts: Sequence[str]
    location: str  # of the question, in messages
    type: str | None = None  # of the question; None: no group of `by_type`
    choices: Sequence[str] = ()  # of a multiple-choice question, without their letters


class Keys(NamedTuple):
    """Keys of a number that a metric computes."""

    example: str  # in a line of predictions.jsonl
    mean: str  # in eval.json, like those below
    interval: str  # its 95 % interval, [low, high]
    by_type: str  # type of question -> mean
    type_intervals: str  # type of question -> interval
    shuffled: str  # mean over the examples, each with the images of another
    # of a metric of attention
    count: str  # number of questions that have a value
    by_layer: str  # layer -> name of a number -> mean


def metric_keys(name: str) -> Keys:
    """Returns the keys of a metric, or of a part such as `pope_f1`."""
    by_type, example = f"{name}_by_type", name
    if name == DEFAULT_METRIC:
        by_type, example = "by_type", "correct"
    interval = f"{name}_interval"
    return Keys(
        example,
        name,
        interval,
        by_type,
        f"{by_type}_intervals",
        SHUFFLED + name,
        f"{name}_examples",
        f"{name}_by_layer",
    )


class Score(NamedTuple):
    """One number of eval.json."""

    metric: str  # or a part of a metric
    is_shuffled: bool = False
    type: str | None = None  # of question; None: all of them


def number_names(metric: str) -> list[str]:
    """Returns the names of the numbers that a metric computes: its own, and those of its parts."""
    return [metric, *[f"{metric}_{part}" for part in METRICS[metric].parts]]


def metric_of(number: str) -> str:
    """Returns the metric that computes a number: `pope` for `pope_f1`."""
    return next(metric for metric in METRICS if number in number_names(metric))


def all_numbers() -> Iterator[str]:
    """Yields the names of all numbers of all metrics."""
    for metric in METRICS:
        yield from number_names(metric)


def parse_score(name: str) -> Score | None:
    """Returns the score with a name, such as `exact_match` or `by_type.color`; None if unknown."""
    key, _, question_type = name.partition(".")
    for number in all_numbers():
        keys = metric_keys(number)
        if question_type and key == keys.by_type:
            return Score(number, type=question_type)
        if not question_type and key in (keys.mean, keys.shuffled):
            return Score(number, is_shuffled=key == keys.shuffled)
    return None


def score_bounds(name: str) -> Bounds:
    """Returns the lowest and the highest possible value of a score that `parse_score` accepts."""
    return METRICS[metric_of(parse_score(name).metric)].bounds


def score_names() -> list[str]:
    """Returns the names that `parse_score` accepts; NAME stands for a type of question."""
    names = []
    for number in all_numbers():
        keys = metric_keys(number)
        names += [keys.mean, keys.shuffled, f"{keys.by_type}.NAME"]
    return names


def check_best_metric(cfg: Experiment) -> None:
    """Checks `train.best_metric`.

    Raises:
      ConfigError: no validation computes the score.
    """
    name, names = cfg.train.best_metric, validation_scores(cfg)
    if name is not None and name not in names:
        reason = "" if cfg.eval.during_examples else " with eval.during_examples 0"
        raise ConfigError(
            f"train.best_metric {name!r} is not a score of a validation{reason}"
            f"{nearest(name, names)}: choose one of {', '.join(names)}."
        )


def validation_scores(cfg: Experiment) -> list[str]:
    """Returns the names of the scores of a validation, such as val/loss and val/exact_match.

    A split of a mixture has the loss of each source, too: val/loss/NAME.
    """
    numbers = []
    if cfg.eval.during_examples:
        for metric in of_answers(cfg.eval.metrics):
            numbers += number_names(metric)
    names = []
    for split, text in cfg.eval.named_splits.items():
        sources = [f"loss/{source.name}" for source in cfg.validation_data(text).mixture]
        names += [f"{split}/{number}" for number in ("loss", *sources, *numbers)]
    return names


def check_attention(cfg: Experiment) -> None:
    """Checks that the attention metrics of `eval.metrics` can be computed.

    Raises:
      ConfigError: the model has no attention to images, or the place of objects is not known.
    """
    for metric in of_attention(cfg.eval.metrics):
        vision = cfg.vision
        if not cfg.fusion.has_images:
            raise ConfigError(
                f"eval.metrics {metric} needs a model with images: fusion.kind {cfg.fusion.kind} "
                "has none."
            )
        if cfg.eval_data.mixture:
            raise ConfigError(
                f"eval.metrics {metric} needs to know where objects are, which data.mixture does "
                "not say: leave the metric out."
            )
        if not cfg.eval_data.dataset.has_boxes:
            names = [name for name, row in DATASETS.items() if row.has_boxes]
            raise ConfigError(
                f"eval.metrics {metric} needs to know where objects are: data.source "
                f"{cfg.data.source} does not say, choose {', '.join(names)}."
            )
        is_cropped = vision.resize == "crop" and vision.shortest_edge_px != vision.image_size_px
        if is_cropped or vision.keeps_aspect_in_tiles:
            raise ConfigError(
                f"eval.metrics {metric} needs whole images: vision.resize {vision.resize} cuts or "
                "pads them, choose squash."
            )


def check_references(metrics: Sequence[str], references: Sequence[Reference]) -> None:
    """Checks, before any answer exists, that every metric can score every question.

    Raises:
      DataError: the references of a question do not fit a metric; the message names both.
    """
    for metric in of_answers(metrics):
        # A metric of all answers together needs a number of them, whatever their texts.
        checked = references[:2] if METRICS[metric].takes_all else references
        evaluate_metric(metric, [""] * len(checked), checked)


def evaluate_metrics(
    metrics: Sequence[str], predictions: Sequence[str], references: Sequence[Reference]
) -> dict[str, list[Any]]:
    """Returns metric -> `evaluate_metric`."""
    return {metric: evaluate_metric(metric, predictions, references) for metric in metrics}


def evaluate_model(
    metrics: Sequence[str], computed: Sequence[Attention | AnswerLoss | None]
) -> dict[str, list[Any]]:
    """Returns metric -> value of its function for what a model computes of every question.

    None for a question without an object.
    """
    values = {}
    for metric in metrics:
        function = METRICS[metric].function
        values[metric] = [None if one is None else function(one) for one in computed]
    return values


def evaluate_metric(
    metric: str, predictions: Sequence[str], references: Sequence[Reference]
) -> list[Any]:
    """Returns the value of a metric's function for every answer.

    Raises:
      DataError: the references of a question do not fit the metric.
    """
    row = METRICS[metric]
    if row.takes_all:
        try:
            return row.function(predictions, [reference.texts for reference in references])
        except DataError as error:
            raise DataError(f"metric {metric}: {error}.") from None
    values = []
    for prediction, reference in zip(predictions, references, strict=True):
        choices = [reference.choices] if row.takes_choices else []
        try:
            values.append(row.function(prediction, reference.texts, *choices))
        except DataError as error:
            raise DataError(f"{reference.location}: metric {metric}: {error}.") from None
    return values


def answer_scores(metric: str, values: Sequence[Any]) -> list[float] | None:
    """Returns the score of every answer; None if an answer alone has none."""
    score_answer = METRICS[metric].score_answer
    return None if score_answer is None else [score_answer(value) for value in values]


def summarize(metric: str, values: Sequence[Any]) -> dict[str, Estimate]:
    """Returns the numbers of many answers by name, such as `pope` and `pope_f1`."""
    summary = METRICS[metric].summary(values)
    return {f"{metric}_{part}" if part else metric: number for part, number in summary.items()}


def summarize_by_type(
    metric: str, values: Sequence[Any], references: Sequence[Reference]
) -> dict[str, dict[str, Estimate]]:
    """Returns type of question -> `summarize` of its answers."""
    by_type = defaultdict(list)
    for value, reference in zip(values, references, strict=True):
        if reference.type is not None and value is not None:
            by_type[reference.type].append(value)
    return {name: summarize(metric, by_type[name]) for name in sorted(by_type)}


def describe_numbers(
    metric: str, values: Sequence[Any], references: Sequence[Reference]
) -> dict[str, Any]:
    """Returns the numbers of a metric with their intervals, by their keys in eval.json."""
    by_type = summarize_by_type(metric, values, references)
    numbers: dict[str, Any] = {}
    for name, number in summarize(metric, values).items():
        keys = metric_keys(name)
        numbers[keys.mean] = number.mean
        numbers[keys.interval] = [number.low, number.high]
        numbers[keys.by_type] = {key: group[name].mean for key, group in by_type.items()}
        numbers[keys.type_intervals] = {
            key: [group[name].low, group[name].high] for key, group in by_type.items()
        }
    if METRICS[metric].of_attention:
        scored = [value for value in values if value is not None]
        numbers[metric_keys(metric).count] = len(scored)
        numbers[metric_keys(metric).by_layer] = grounding.by_layer(scored)
    return numbers


def describe_rules(metrics: Iterable[str]) -> dict[str, Mapping[str, str]]:
    """Returns the variant and the source of each metric, for eval.json."""
    return {
        name: {"variant": METRICS[name].variant, "source": METRICS[name].source} for name in metrics
    }
