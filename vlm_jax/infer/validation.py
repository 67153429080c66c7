"""Scores of a validation while training: the loss of each split, and metrics of its answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import grain
import jax
from flax import traverse_util

from vlm_jax import axes, sharding
from vlm_jax.config import ConfigError, Data, Experiment, UserError
from vlm_jax.data import length_check, overlap, pipeline, questions
from vlm_jax.data.questions import Question
from vlm_jax.infer import evaluate
from vlm_jax.infer.evaluate import Answerer, references
from vlm_jax.infer.metrics import scores as metric_scores
from vlm_jax.infer.metrics.table import of_answers
from vlm_jax.nn import lora
from vlm_jax.train import step
from vlm_jax.train.inputs import Inputs
from vlm_jax.train.validation import LOSS


@dataclass(frozen=True)
class Split:
    """A split to validate on."""

    name: str
    batches: grain.IterDataset  # this process's rows of batches with the shape of the training's
    examples: list[Question]  # to be answered
    sources: Sequence[str] = ()  # names of the sources of a mixture


class Scorer:
    """Computes the scores of all splits from the parameters of a run.

    The loss and the answers have one compiled program each, which is kept.
    """

    def __init__(
        self, cfg: Experiment, inputs: Inputs, splits: Sequence[Split], answerer: Answerer | None
    ):
        self._cfg, self._mesh, self._splits = cfg, inputs.mesh, splits
        self._answerer = answerer  # None: no question is answered
        self._sums = step.jit_validation_sums(cfg, inputs.mesh)

    def __call__(self, params) -> dict[str, float]:
        """Returns the scores by name, such as val/loss and val/exact_match."""
        scores = {}
        for split in self._splits:
            for name, loss in self._mean_losses(params, split).items():
                scores[f"{split.name}/{name}"] = loss
            for name, score in self._metrics(params, split).items():
                scores[f"{split.name}/{name}"] = score
        return scores

    def _mean_losses(self, params, split: Split) -> dict[str, float]:
        """Returns the nats per scored token of the whole split, and of each source of a mixture."""
        sums = []
        for batch in split.batches:
            batch = sharding.place_own_rows(batch, self._mesh)
            # Waits for the devices, so that they hold one batch and not all.
            sums.append(jax.device_get(self._sums(params, batch)))
        nats = math.fsum(batch.nats.total for batch in sums)
        losses = {LOSS: nats / math.fsum(batch.count for batch in sums)}
        for number, name in enumerate(split.sources):
            count = math.fsum(batch.count_by_source[number] for batch in sums)
            if count:
                nats = math.fsum(batch.nats.by_source[number] for batch in sums)
                losses[f"{LOSS}/{name}"] = nats / count
        return losses

    def _metrics(self, params, split: Split) -> dict[str, float]:
        if self._answerer is None:
            return {}
        # Not merged: that would be a copy of every kernel with an adapter.
        params = lora.as_applied(self._cfg.lora, traverse_util.flatten_dict(params))
        params = step.cast_to_compute_dtype(self._cfg, traverse_util.unflatten_dict(params))
        predictions = self._answerer.answer(params, split.examples, split.examples)
        right = references(split.examples)
        numbers = {}
        metrics = of_answers(self._cfg.eval.metrics)
        values = metric_scores.evaluate_metrics(metrics, predictions, right)
        for metric in values:
            for name, number in metric_scores.summarize(metric, values[metric]).items():
                numbers[name] = number.mean
        return numbers


def prepare_scores(cfg: Experiment, inputs: Inputs) -> Scorer:
    """Reads the splits of `eval.splits` and checks that every question can be scored.

    The first process prints questions that are also in the training data.

    Raises:
      ConfigError: a split does not exist, or a question is too long.
      DataError: the references of a question do not fit a metric.
    """
    metric_scores.check_best_metric(cfg)
    splits, data_of_split = [], {}
    for name, text in cfg.eval.named_splits.items():
        data = cfg.validation_data(text)
        data_of_split[f"{name}={text}"] = data
        try:
            splits.append(_read_split(name, replace(cfg, data=data), inputs))
        except UserError as error:
            raise _name_split(error, name, text) from error
    if jax.process_index() == 0:
        _print_overlaps(cfg, data_of_split)
    return Scorer(cfg, inputs, splits, _make_answerer(cfg, inputs, splits))


def _name_split(error: UserError, name: str, text: str) -> ConfigError:
    """Returns the error of a reader, which names the field of the training, for a split."""
    entry, field, message = f"eval.splits {name}={text}", f"data.train_split {text!r}", str(error)
    if field in message:
        return ConfigError(message.replace(field, entry))
    return ConfigError(f"{entry}: {message}")


def _read_split(name: str, cfg: Experiment, inputs: Inputs) -> Split:
    """Reads the split `data.train_split` of an experiment."""
    batches = pipeline.validation_batches(
        cfg, inputs.tokenizer, *sharding.share_of_rows(inputs.mesh)
    )
    examples = questions.load(cfg, cfg.data.train_split, cfg.eval.during_examples)
    warnings = []
    if cfg.data.is_conversations:
        warnings.append(length_check.dropped_questions_message(cfg, inputs.tokenizer))
    if examples:
        metric_scores.check_references(cfg.eval.metrics, references(examples))
        warnings.append(evaluate.warn_of_long_answers(cfg, inputs.tokenizer, examples))
    for warning in filter(None, warnings):
        if jax.process_index() == 0:
            print(f"eval.splits {name}: {warning}", flush=True)
    return Split(name, batches, examples, [source.name for source in cfg.data.mixture])


def _print_overlaps(cfg: Experiment, splits: Mapping[str, Data]) -> None:
    for split, (count, total) in overlap.count_overlaps(cfg.data, splits).items():
        if count:
            print(
                f"warning: {count} of the {total} questions of eval.splits {split} are also in the "
                f"training data (data.train_split {cfg.data.train_split}), with the same images.",
                flush=True,
            )


def _make_answerer(cfg: Experiment, inputs: Inputs, splits: Sequence[Split]) -> Answerer | None:
    """Returns an answerer for the questions of all splits; None if none are to be answered."""
    if not cfg.eval.during_examples:
        return None
    examples = [split.examples for split in splits]
    # Few questions need no more rows than they have.
    most = axes.round_up_to_shards(max(map(len, examples)), inputs.mesh)
    batch_size = min(cfg.eval.batch_size, most)
    return evaluate.make_answerer(cfg, inputs.tokenizer, examples, examples, batch_size)
