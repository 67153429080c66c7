"""Loss of the right answers to the questions of an evaluation."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_jax import axes, sharding
from vlm_jax.config import Experiment
from vlm_jax.data import questions
from vlm_jax.data.questions import Question
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.infer.batches import batch_indices, image_rows
from vlm_jax.infer.generate import NonFiniteLogits, params_dtype
from vlm_jax.infer.likelihood import WIDTH_MULTIPLE, last_answers, token_scores
from vlm_jax.infer.metrics.loss import AnswerLoss

MOST_ENDING_TOKENS = 16  # of a conversation's template, after an answer


def answer_losses(
    cfg: Experiment,
    params,
    tokenizer: Tokenizer,
    examples: Sequence[Question],
    image_sources: Sequence[Question],
) -> list[AnswerLoss]:
    """Returns the loss of the right answer to each question, about the images of its
    `image_sources` entry.

    Batches have one shape, or at native resolution few, so that few programs are compiled. Of
    several right answers, the one that the training data has counts (`Question.answer`).

    Raises:
      NonFiniteLogits: the model computes NaN for a question.
    """
    mesh, size = axes.make_mesh(cfg.mesh), cfg.eval.batch_size
    longest = max(len(tokenizer.encode(question.answer)) + 1 for question in examples)
    longest += MOST_ENDING_TOKENS if cfg.data.is_conversations else 0
    length = questions.row_length(cfg, tokenizer, examples) + longest
    length = min(length, cfg.decoder.max_positions)
    # The answers end the rows, which are padded on the left.
    width = min(length, longest + -longest % WIDTH_MULTIPLE)
    rows = image_rows([image_sources], size, mesh)
    losses = []
    for indices in batch_indices(len(examples), size):
        batch = questions.question_batch(
            cfg,
            tokenizer,
            [examples[i] for i in indices],
            [image_sources[i] for i in indices],
            length,
            rows,
            [examples[i].answer for i in indices],
        )
        is_scored = last_answers(batch)[:, -width:]
        with jax.set_mesh(mesh):
            batch = sharding.place_rows(batch, mesh)
            log_probs, _ = token_scores(cfg.model, params, batch, width)
        log_probs = multihost_utils.process_allgather(log_probs, tiled=True)
        for row, i in enumerate(indices):
            scores = log_probs[row, is_scored[row]].astype(np.float64)
            failed = np.flatnonzero(~np.isfinite(scores))
            if failed.size:
                error = NonFiniteLogits(int(failed[0]) + 1, row, params_dtype(params))
                raise error.about(examples[i].question)
            losses.append(AnswerLoss(-float(scores.sum()), len(scores)))
    return losses[: len(examples)]
