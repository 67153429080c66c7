"""Metrics of generated answers, and the names of their scores in the files of an evaluation.

To add a metric, write a function and give it a row in METRICS. Evaluation scores every example with
it, and reports the mean over the examples, over the examples with shuffled images, and by type of
question.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

# A generated answer and the reference answers of its question -> a score; higher is better.
Metric = Callable[[str, Sequence[str]], float]


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Returns whether the prediction equals a reference, character by character."""
    return prediction in references


METRICS: dict[str, Metric] = {"exact_match": exact_match}

# Its scores have the plain keys `correct` and `by_type`.
DEFAULT_METRIC = "exact_match"
SHUFFLED = "image_shuffled_"


class Keys(NamedTuple):
    """Keys of a metric's scores."""

    example: str  # in a line of predictions.jsonl
    mean: str  # in eval.json, like those below
    by_type: str  # type of question -> mean
    shuffled: str  # mean over the examples, each with the images of another


def metric_keys(metric: str) -> Keys:
    """Returns the keys of a metric in predictions.jsonl and eval.json."""
    if metric == DEFAULT_METRIC:
        return Keys("correct", metric, "by_type", SHUFFLED + metric)
    return Keys(metric, metric, f"{metric}_by_type", SHUFFLED + metric)


class Score(NamedTuple):
    """One number of eval.json."""

    metric: str
    is_shuffled: bool = False
    type: str | None = None  # of question; None: all of them


def parse_score(name: str) -> Score | None:
    """Returns the score with a name, such as `exact_match` or `by_type.color`; None if unknown."""
    key, _, question_type = name.partition(".")
    for metric in METRICS:
        keys = metric_keys(metric)
        if question_type and key == keys.by_type:
            return Score(metric, type=question_type)
        if not question_type and key in (keys.mean, keys.shuffled):
            return Score(metric, is_shuffled=key == keys.shuffled)
    return None


def score_names() -> list[str]:
    """Returns the names that `parse_score` accepts; NAME stands for a type of question."""
    names = []
    for metric in METRICS:
        keys = metric_keys(metric)
        names += [keys.mean, keys.shuffled, f"{keys.by_type}.NAME"]
    return names
