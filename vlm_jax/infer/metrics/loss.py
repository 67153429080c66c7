"""Loss of the right answers: a metric without a floor and without a ceiling."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlm_jax.infer.metrics.intervals import Estimate, estimate_of_sums


class AnswerLoss(NamedTuple):
    """Cross-entropy of the right answer to a question, its end token included."""

    nats: float  # summed over the tokens
    tokens: int


def summarize(values: Sequence[AnswerLoss]) -> dict[str, Estimate]:
    """Returns the nats per token of all answers together."""
    return {"": estimate_of_sums(np.array(values, float), lambda sums: sums[0] / sums[1])}
