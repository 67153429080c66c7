"""Evaluation of generated answers, with the right images and with images of other examples."""

import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from vlm_jax import axes, sharding
from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data import questions
from vlm_jax.data.questions import Question
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.infer.answer_loss import answer_losses
from vlm_jax.infer.batches import batch_indices, image_rows
from vlm_jax.infer.generate import NonFiniteLogits, SamplingParams, generate
from vlm_jax.infer.look.grounding import attention_on_objects
from vlm_jax.infer.metrics import scores as metric_scores
from vlm_jax.infer.metrics.answers import exact_match
from vlm_jax.infer.metrics.grounding import Attention
from vlm_jax.infer.metrics.loss import AnswerLoss
from vlm_jax.infer.metrics.scores import Reference, metric_keys
from vlm_jax.infer.metrics.table import check_metrics, of_answers, of_attention, of_loss
from vlm_jax.infer.samples import draw_samples
from vlm_jax.runtime import distributed
from vlm_jax.runtime.workdir import EvaluationFolder, Workdir, write_atomic


def evaluate(
    cfg: Experiment,
    params,
    tokenizer: Tokenizer,
    step: int | None = None,
    folder: EvaluationFolder | None = None,
) -> dict:
    """Answers the questions of `eval.split` or `eval.files` and scores them by `eval.metrics`.

    Every question is answered twice: with its own images, and with the images of another question
    (`image_shuffled_...`), which shows how much the answers depend on the images. All processes
    take part; the first one writes eval.json, predictions.jsonl and samples.png.

    Args:
      step: of the checkpoint, for eval.json.
      folder: to write to; None: the work folder of the run.

    Raises:
      ConfigError: a metric does not exist, the folder cannot be written, the split does not exist,
        or a prompt is too long.
      DataError: the references of a question do not fit a metric.
      NonFiniteLogits: the model computes NaN for a question; then nothing is written.
    """
    check_metrics(cfg.eval.metrics, "eval.metrics")
    metric_scores.check_attention(cfg)
    folder = folder or Workdir(cfg.workdir)
    is_first_process = jax.process_index() == 0
    with distributed.raise_on_all():
        if is_first_process:
            folder.check_writable()
    examples = questions.to_evaluate(cfg)
    metrics, right = cfg.eval.metrics, references(examples)
    metric_scores.check_references(metrics, right)
    warning = warn_of_long_answers(cfg, tokenizer, examples)
    if is_first_process and warning:
        print(warning, flush=True)

    image_sources = {"evaluating": examples, "with shuffled images": shuffle_images(examples)}
    predictions, shuffled_predictions = answer(cfg, params, tokenizer, examples, image_sources)
    of_text = of_answers(metrics)
    values = metric_scores.evaluate_metrics(of_text, predictions, right)
    shuffled_values = metric_scores.evaluate_metrics(of_text, shuffled_predictions, right)
    for computed_metrics, compute in ((of_attention(metrics), attend), (of_loss(metrics), losses)):
        if computed_metrics:
            computed, shuffled = compute(cfg, params, tokenizer, examples, image_sources.values())
            values |= metric_scores.evaluate_model(computed_metrics, computed)
            shuffled_values |= metric_scores.evaluate_model(computed_metrics, shuffled)
    scores = {
        "split": cfg.eval.read_split,
        "files": list(cfg.eval_data.files),
        "examples": len(examples),
        "step": step,
        "max_new_tokens": cfg.eval.max_new_tokens,
        **score(right, values, shuffled_values),
    }

    if is_first_process:
        folder.keep_settings()
        write_atomic(folder.predictions, prediction_lines(examples, predictions, values))
        draw_samples(folder.samples, examples, predictions, cfg.eval.title)
        write_atomic(folder.eval, json.dumps(scores, indent=2) + "\n")
    return scores


def attend(
    cfg: Experiment,
    params,
    tokenizer: Tokenizer,
    examples: list[Question],
    image_sources: Iterable[list[Question]],
) -> list[list[Attention | None]]:
    """Returns the attention on the object of every question, for each list of questions whose
    images to use.

    Raises:
      ConfigError: no question has an object.
    """
    boxes = questions.boxes_to_evaluate(cfg)
    if not any(boxes):
        raise ConfigError(
            f"eval.metrics {of_attention(cfg.eval.metrics)[0]} has no question to score: none of "
            f"the {len(examples)} questions of {cfg.eval.title} asks about a single object."
        )
    return [
        attention_on_objects(cfg, params, tokenizer, examples, sources, boxes)
        for sources in image_sources
    ]


def losses(
    cfg: Experiment,
    params,
    tokenizer: Tokenizer,
    examples: list[Question],
    image_sources: Iterable[list[Question]],
) -> list[list[AnswerLoss]]:
    """Returns the loss of every right answer, for each list of questions whose images to use."""
    return [answer_losses(cfg, params, tokenizer, examples, sources) for sources in image_sources]


def references(examples: Sequence[Question]) -> list[Reference]:
    """Returns the right answers of each question."""
    right = []
    for question in examples:
        location = question.location or f"image {question.image_id}: {question.question!r}"
        right.append(Reference(question.references, location, question.type, question.choices))
    return right


def score(
    right: Sequence[Reference],
    values: Mapping[str, Sequence],
    shuffled_values: Mapping[str, Sequence],
) -> dict:
    """Returns the scores of every metric, with their keys in eval.json.

    Args:
      values: metric -> value of each answer.
      shuffled_values: the same of the answers about shuffled images.
    """
    scores = {}
    for metric in values:
        scores |= metric_scores.describe_numbers(metric, values[metric], right)
        for name, number in metric_scores.summarize(metric, shuffled_values[metric]).items():
            scores[metric_keys(name).shuffled] = number.mean
    return {**scores, "metrics": metric_scores.describe_rules(values)}


def describe_scores(scores: Mapping, title: str) -> list[str]:
    """Returns a line about each number of each metric, for people to read."""
    lines = []
    for metric in scores["metrics"]:
        examples = scores.get(metric_keys(metric).count, scores["examples"])
        for name in metric_scores.number_names(metric):
            keys = metric_keys(name)
            low, high = scores[keys.interval]
            lines.append(
                f"{name.replace('_', ' ')} {scores[keys.mean]:.4f} (95 % interval {low:.4f} to "
                f"{high:.4f}) on {examples} questions of {title}, "
                f"{scores[keys.shuffled]:.4f} with shuffled images"
            )
    return lines


def prediction_lines(
    examples: list[Question], predictions: list[str], values: Mapping[str, Sequence]
) -> str:
    """Returns predictions.jsonl: a question, the prediction and its scores on each line.

    `python run.py score` reads it. `values` are as in `score`.
    """
    scores = {}
    for metric in values:
        answers = metric_scores.answer_scores(metric, values[metric])
        if answers is not None:
            scores[metric_keys(metric).example] = answers
    lines = []
    for i, (question, prediction) in enumerate(zip(examples, predictions, strict=True)):
        row = {name: getattr(question, name) for name in ("image_id", "question", "type", "answer")}
        row["references"] = list(question.references)
        if question.choices:
            row["choices"] = list(question.choices)
        row["prediction"] = prediction
        row["correct"] = exact_match(prediction, question.references)
        row |= {key: answers[i] for key, answers in scores.items()}
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def warn_of_long_answers(cfg: Experiment, tokenizer: Tokenizer, examples: list[Question]) -> str:
    """Returns a sentence about answers longer than `eval.max_new_tokens`; "" without any.

    Of several references the shortest counts.
    """
    max_new_tokens = cfg.eval.max_new_tokens
    lengths = []
    for question in examples:
        lengths.append(min(len(tokenizer.encode(text)) for text in set(question.references)))
    count = sum(length > max_new_tokens for length in lengths)
    if not count:
        return ""
    return (
        f"{count} of {len(examples)} answers are longer than eval.max_new_tokens {max_new_tokens} "
        f"and cannot be reached: the longest has {max(lengths)} tokens."
    )


def shuffle_images(examples: list[Question]) -> list[Question]:
    """Pairs every question with another that has the same number of images.

    It is the question half of these away, so that in most cases its image is another, too.
    """
    image_sources = list(examples)
    for count in {question.image_count for question in examples}:
        same_count = [i for i, question in enumerate(examples) if question.image_count == count]
        half = len(same_count) // 2
        for i, other in zip(same_count, same_count[half:] + same_count[:half]):
            image_sources[i] = examples[other]
    return image_sources


@dataclass(frozen=True)
class Answerer:
    """Generates answers to questions in batches of one shape, which is compiled once.

    At native resolution the images of a batch decide which of a few shapes it has.

    Attributes:
      batch_size: number of questions in a batch.
      row_length: S of a batch with the largest images.
      image_rows: number of rows of images of a batch.
    """

    cfg: Experiment
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    batch_size: int
    row_length: int
    image_rows: int

    def answer(
        self, params, examples: list[Question], image_sources: list[Question], label: str = ""
    ) -> list[str]:
        """Generates one answer to each question, about the images of its `image_sources` entry.

        Progress is shown under `label`, if it is not empty.
        """
        batches = batch_indices(len(examples), self.batch_size)
        if label:
            # Without a terminal, tqdm shows no bar.
            if not sys.stderr.isatty():
                print(f"{label}: {len(examples)} questions", flush=True)
            batches = tqdm(batches, desc=label, unit="batch", disable=None)
        answers = []
        for indices in batches:
            questions_of_batch = [examples[i] for i in indices]
            answers += self._answer_batch(
                params, questions_of_batch, [image_sources[i] for i in indices]
            )
        return answers[: len(examples)]

    def _answer_batch(
        self, params, examples: list[Question], image_sources: list[Question]
    ) -> list[str]:
        cfg, tokenizer = self.cfg, self.tokenizer
        batch = questions.question_batch(
            cfg, tokenizer, examples, image_sources, self.row_length, self.image_rows
        )
        sampling = SamplingParams(eos=tokenizer.eos_ids)
        try:
            with jax.set_mesh(self.mesh):
                batch = sharding.place_rows(batch, self.mesh)
                tokens = generate(cfg.model, params, batch, cfg.eval.max_new_tokens, sampling)
        except NonFiniteLogits as error:
            raise error.about(examples[error.row].question) from None
        tokens = multihost_utils.process_allgather(tokens, tiled=True)
        # A template may put a space before the answer.
        return [tokenizer.decode(ids).strip() for ids in tokens]


def make_answerer(
    cfg: Experiment,
    tokenizer: Tokenizer,
    examples: Sequence[list[Question]],
    image_sources: Sequence[list[Question]],
    batch_size: int,
) -> Answerer:
    """Returns an `Answerer` for lists of questions, each with a list of `image_sources`.

    Raises:
      ConfigError: a prompt is too long.
    """
    mesh = axes.make_mesh(cfg.mesh)
    row_length = questions.row_length(cfg, tokenizer, itertools.chain.from_iterable(examples))
    rows = image_rows(image_sources, batch_size, mesh)
    return Answerer(cfg, tokenizer, mesh, batch_size, row_length, rows)


def answer(
    cfg: Experiment,
    params,
    tokenizer: Tokenizer,
    examples: list[Question],
    image_sources: Mapping[str, list[Question]],
) -> list[list[str]]:
    """Generates one answer to each question, for each labeled list of questions whose images to
    use.
    """
    sources = list(image_sources.values())
    answerer = make_answerer(
        cfg, tokenizer, [examples] * len(sources), sources, cfg.eval.batch_size
    )
    return [
        answerer.answer(params, examples, shown, label) for label, shown in image_sources.items()
    ]
