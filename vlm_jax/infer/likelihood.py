"""Log-likelihoods of texts as answers to prompts."""

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vlm_jax.config import Model
from vlm_jax.hub.images.steps import ImageInputs
from vlm_jax.hub.text.prompts import ChatPrompt
from vlm_jax.infer.answer import pad_multiple, question
from vlm_jax.infer.generate import NonFiniteLogits, params_dtype
from vlm_jax.infer.processor import Processor
from vlm_jax.nn.vlm import VLM
from vlm_jax.structs import Batch

WIDTH_MULTIPLE = 16  # of the slots whose logits are computed


class Likelihood(NamedTuple):
    """Likelihood of an answer, without the token that ends it."""

    log_likelihood: float  # nats, summed over its tokens
    is_greedy: bool  # greedy generation begins with its tokens


def score_answers(
    model: VLM,
    params,
    processor: Processor,
    prompts: Sequence[str | ChatPrompt],
    images: ImageInputs,
    answers: Sequence[str],
    pad_to_multiple_of: int = 1,
) -> list[Likelihood]:
    """Returns the likelihood of each answer to its prompt.

    Prompts and answers are formatted as in training on conversations.

    Args:
      pad_to_multiple_of: as of a `Processor`.

    Raises:
      ConfigError: a prompt with its answer is too long, or images do not match the prompts.
      NonFiniteLogits: the model computes NaN for a prompt.
    """
    multiple = pad_multiple(model.cfg, pad_to_multiple_of)
    batch = processor(prompts, images, chat=True, answers=answers, pad_to_multiple_of=multiple)
    is_scored = find_answers(batch, processor.eos_ids)  # (B, S)
    length = is_scored.shape[1]
    # The answers end the rows, which are padded on the left.
    first = int(np.argmax(is_scored.any(axis=0)))
    width = min(length, length - first + -(length - first) % WIDTH_MULTIPLE)
    log_probs, is_top = jax.device_get(token_scores(model.cfg, params, batch, width))
    likelihoods = []
    for row, scored in enumerate(is_scored[:, -width:]):
        scores = log_probs[row, scored].astype(np.float64)
        failed = np.flatnonzero(~np.isfinite(scores))
        if failed.size:
            error = NonFiniteLogits(int(failed[0]) + 1, row, params_dtype(params))
            raise error.about(question(prompts[row]))
        likelihoods.append(Likelihood(float(scores.sum()), bool(is_top[row, scored].all())))
    return likelihoods


def find_answers(batch: Batch, eos_ids: Collection[int]) -> np.ndarray:
    """Mask (B, S) of the slots that predict the last answer of each row, up to its end token."""
    is_scored, targets = last_answers(batch), np.asarray(batch.targets)
    for row, slots in enumerate(map(np.flatnonzero, is_scored)):
        ends = np.flatnonzero(np.isin(targets[row, slots], list(eos_ids)))
        if ends.size:
            is_scored[row, slots[ends[0] :]] = False
    return is_scored


def last_answers(batch: Batch) -> np.ndarray:
    """Mask (B, S) of the scored slots that predict the last answer of each row, with its end."""
    weights = np.asarray(batch.loss_weights) > 0
    is_scored = np.zeros_like(weights)
    for row, slots in enumerate(map(np.flatnonzero, weights)):
        # Slots of earlier answers of a conversation are apart from these.
        start = np.flatnonzero(np.diff(slots, prepend=-2) > 1)[-1]
        is_scored[row, slots[start:]] = True
    return is_scored


@functools.partial(jax.jit, static_argnames=("cfg", "width"))
def token_scores(
    cfg: Model, params, batch: Batch, width: int
) -> tuple[Float[Array, "B width"], Bool[Array, "B width"]]:
    """Log-probabilities of the targets of the last `width` slots, and whether each is the top."""
    variables = {"params": params}
    hidden, _ = VLM(cfg).apply(variables, batch, method=VLM.hidden)
    logits = VLM(cfg).apply(variables, hidden[:, -width:], method=VLM.head).astype(jnp.float32)
    targets = batch.targets[:, -width:]
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    log_probs = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return log_probs, jnp.argmax(logits, axis=-1) == targets
