"""Responses to the requests of lmms-eval, which this module does not import."""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from vlm_jax.config import ConfigError
from vlm_jax.infer import models, run
from vlm_jax.infer.answer import LENGTH_MULTIPLE, AnswerOptions, encode
from vlm_jax.infer.batches import batch_indices
from vlm_jax.infer.likelihood import Likelihood, score_answers
from vlm_jax.infer.lmms_eval.queries import Documents, Query, likelihood_query, read_options
from vlm_jax.infer.processor import Processor
from vlm_jax.nn.models import build_model
from vlm_jax.nn.vlm import VLM


@dataclass(frozen=True)
class Responder:
    """Answers requests in batches of few shapes, in the order of the length of their contexts.

    Attributes:
      batch_size: number of requests in a batch.
      max_new_tokens: of an answer to a task that states none.
    """

    model: VLM
    params: Any
    processor: Processor
    batch_size: int
    max_new_tokens: int

    def answer(self, queries: Sequence[Query]) -> list[str]:
        """Generates an answer to each query.

        Raises:
          UserError: an option, a prompt or an image is not supported; the message names it.
          NonFiniteLogits: the model computes NaN for a prompt.
        """
        rows_of_options = defaultdict(list)
        for row, query in enumerate(queries):
            options, ignored = read_options(query.options, self.max_new_tokens)
            rows_of_options[options].append(row)
            if ignored:
                _warn_of_ignored(tuple(ignored))
        answers = [""] * len(queries)
        for options, rows in rows_of_options.items():
            sizes = {row: len(queries[row].context) for row in rows}
            for number, indices in enumerate(self._batches(sizes, "answering")):
                # Equal prompts in several batches are samples of one distribution.
                texts = self._answer_batch(
                    [queries[i] for i in indices], replace(options, seed=number)
                )
                for i, text in zip(indices, texts, strict=True):
                    answers[i] = text
        return answers

    def answer_rounds(self, queries: Sequence[Query]) -> list[list[str]]:
        """Generates the answers of all rounds of each query; raises as `answer`."""
        outputs: list[list[str]] = [[] for _ in queries]
        infos: list[Any] = [None] * len(queries)
        active = dict(enumerate(queries))
        number = 0
        while active:
            number += 1
            following = {}
            for row, text in zip(active, self.answer(list(active.values())), strict=True):
                query = active[row]
                after = query.next_round(number, [*outputs[row], text], infos[row])
                outputs[row], infos[row] = after.outputs, after.info
                if after.read is not None:
                    following[row] = replace(query, read=after.read)
            active = following
        return outputs

    def score(self, requests: Sequence[tuple], documents: Documents) -> list[Likelihood]:
        """Returns the likelihood of the text of each request; raises as `answer`.

        Args:
          requests: arguments of each, as `likelihood_query` reads them.
        """
        likelihoods: list[Any] = [None] * len(requests)
        sizes = {row: len(arguments[0]) for row, arguments in enumerate(requests)}
        for indices in self._batches(sizes, "scoring"):
            questions, texts = [], []
            for i in indices:
                question, text = likelihood_query(requests[i], documents)
                questions.append(question)
                texts.append(text)
            scores = score_answers(
                self.model,
                self.params,
                self.processor,
                [question.prompt for question in questions],
                [question.images for question in questions],
                texts,
                LENGTH_MULTIPLE,
            )
            for i, likelihood in zip(indices, scores, strict=True):
                likelihoods[i] = likelihood
        return likelihoods

    def _batches(self, sizes: dict[int, int], label: str) -> Iterator[list[int]]:
        """Yields the rows of each batch, the largest first; the last row fills up the last one."""
        rows = sorted(sizes, key=lambda row: -sizes[row])
        batches = batch_indices(len(rows), min(self.batch_size, len(rows)))
        for indices in tqdm(batches, desc=label, unit="batch", disable=None):
            yield [rows[i] for i in indices]

    def _answer_batch(self, queries: Sequence[Query], options: AnswerOptions) -> list[str]:
        questions = [query.read() for query in queries]
        request = encode(
            self.model,
            self.processor,
            [question.prompt for question in questions],
            [question.images for question in questions],
            options,
            LENGTH_MULTIPLE,
        )
        return request.answers(self.params)


def load_model(
    workdir: str | None = None,
    checkpoint: str | None = None,
    adapter: str | None = None,
    step: str | int | None = None,
    intermediate_layers: str | None = None,
) -> tuple[VLM, Any, Processor]:
    """Loads a run or a public checkpoint, like `vlm_jax.from_run` and `from_pretrained`.

    Raises:
      UserError: not one of them is named, an argument belongs to the other, or the folder cannot
        be loaded.
    """
    if bool(workdir) == bool(checkpoint):
        raise ConfigError(
            "vlm_jax needs workdir=DIR, the folder of a run, or checkpoint=DIR, a public "
            "checkpoint, in --model_args."
        )
    if workdir:
        if adapter or intermediate_layers:
            raise ConfigError("adapter and intermediate_layers are for checkpoint=DIR.")
        return run.load_model(workdir, step)
    if step is not None:
        raise ConfigError("step is for workdir=DIR.")
    model = models.open_checkpoint(checkpoint, intermediate_layers, adapter)
    return build_model(model.cfg), model.load_params(), model.load_processor()


def make_responder(
    model: tuple[VLM, Any, Processor], batch_size: int | str, max_new_tokens: int | None
) -> Responder:
    """Returns a responder; the arguments are as in `lmms_eval.models`.

    Raises:
      ConfigError: the batch size is not a whole number of at least 1.
    """
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ConfigError(f"batch_size {batch_size}: it must be a whole number of at least 1.")
    _, _, processor = model
    if max_new_tokens is None:
        max_new_tokens = default_max_new_tokens(processor)
    return Responder(*model, int(batch_size), max_new_tokens)


def default_max_new_tokens(processor: Processor) -> int:
    """Returns `eval.max_new_tokens` of a run, else the default of `vlm_jax.generate`."""
    if isinstance(processor, run.RunProcessor):
        return processor.cfg.eval.max_new_tokens
    return AnswerOptions().max_new_tokens


# Cached, so that a warning is printed once.
@functools.cache
def _warn_of_ignored(names: tuple[str, ...]) -> None:
    print(f"warning: vlm_jax ignores {', '.join(names)} in generation_kwargs.", flush=True)
