"""Answers in a JSON Lines file, made here or elsewhere, and their scores."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from vlm_jax.config import DataError
from vlm_jax.infer.metrics import scores
from vlm_jax.infer.metrics.scores import Reference

LINE_FORMAT = (
    "an object with 'prediction', a text, and 'references', a list of texts; 'type', a text, and "
    "'choices', a list of texts, are optional"
)


class Predictions(NamedTuple):
    """Answers and the right answers of their questions."""

    texts: list[str]
    references: list[Reference]


def read_predictions(file: str) -> Predictions:
    """Returns the answers of a file; empty lines are skipped.

    Raises:
      DataError: the file cannot be read, has no answer, or a line is malformed.
    """
    texts, references = [], []
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    text, reference = _parse_line(line, f"{file}: line {number}")
                    texts.append(text)
                    references.append(reference)
    except OSError as error:
        raise DataError(f"cannot read the predictions of {file}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is not text in UTF-8: save it as UTF-8.") from None
    if not texts:
        raise DataError(f"{file} has no predictions: each line must be {LINE_FORMAT}.")
    return Predictions(texts, references)


def _parse_line(line: str, location: str) -> tuple[str, Reference]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{location} is not valid JSON (column {error.colno}: {error.msg})."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location} is not valid JSON ({error}).") from None
    if not isinstance(row, dict):
        raise DataError(f"{location} must be {LINE_FORMAT}.")
    prediction = row.get("prediction")
    if not isinstance(prediction, str):
        raise DataError(f"{location} has no text 'prediction': it must be {LINE_FORMAT}.")
    if not _is_texts(row.get("references")) or not row["references"]:
        raise DataError(f"{location} has no texts in 'references': it must be {LINE_FORMAT}.")
    question_type, choices = row.get("type"), row.get("choices")
    if question_type is not None and not isinstance(question_type, str):
        raise DataError(f"{location} has a 'type' that is not a text.")
    if choices is not None and not _is_texts(choices):
        raise DataError(f"{location} has 'choices' that are not a list of texts.")
    return prediction, Reference(row["references"], location, question_type, choices or ())


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def score_predictions(
    metrics: Sequence[str], predictions: Predictions, has_examples: bool = False
) -> dict[str, Any]:
    """Returns the scores of answers, with the keys of eval.json.

    Args:
      metrics: rows of METRICS.
      predictions: the answers.
      has_examples: adds `per_example`, a dict with the scores of each answer.

    Raises:
      DataError: the references of a question do not fit a metric.
    """
    numbers: dict[str, Any] = {"examples": len(predictions.texts)}
    values = scores.evaluate_metrics(metrics, *predictions)
    for metric in metrics:
        numbers |= scores.describe_numbers(metric, values[metric], predictions.references)
    numbers["metrics"] = scores.describe_rules(metrics)
    if has_examples:
        examples = [{} for _ in predictions.texts]
        for metric in metrics:
            answer_scores = scores.answer_scores(metric, values[metric])
            for example, score in zip(examples, answer_scores or ()):
                example[metric] = score
        numbers["per_example"] = examples
    return numbers
