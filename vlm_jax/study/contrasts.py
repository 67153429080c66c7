"""Contrasts: the differences of arms that a study names before any run.

`unified_trained - cross_trained` is a contrast, and so is `(a - b) - (c - d)`. A coefficient is
written as `0.5 * a`. `a@by_type.count` is another score of an arm than the study's metric, and
`a@text:nats` a score of the probe `text`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from vlm_jax.config import ConfigError

Sign = Literal["> 0", "< 0", "= 0"]
SIGNS = get_args(Sign)
# Each is one test, and every further one makes all of them weaker.
MAX_CONTRASTS = 3
# Names of arms may contain + and -, so that operators stand between spaces.
TOKEN = re.compile(r"\(|\)|[^\s()]+")
OPERATORS = {"+": 1.0, "-": -1.0}


@dataclass(frozen=True)
class Contrast:
    """A sum of arms with coefficients that add up to 0, and the sign that was published for it."""

    sum: str
    published: Sign
    #: paper and table, with its number
    source: str
    #: of "= 0": the largest difference that counts as equal
    margin: float | None = None
    #: axis of `matched`; None: the first
    axis: str | None = None


class Term(NamedTuple):
    """A score of an arm, times a number."""

    coefficient: float
    arm: str
    score: str | None = None  # None: the metric of the study
    probe: str | None = None  # that computes the score; None: the evaluation of the run


def parse_sum(text: str) -> list[Term]:
    """Returns the terms of a sum of arms.

    Raises:
      ConfigError: the text is not a sum.
    """
    tokens = TOKEN.findall(text)
    terms = _parse_sum(text, tokens)
    if tokens:
        raise _not_a_sum(text)
    return terms


def _parse_sum(text: str, tokens: list[str]) -> list[Term]:
    """Takes a sum from the front of the tokens."""
    sign = OPERATORS[tokens.pop(0)] if tokens and tokens[0] in OPERATORS else 1.0
    terms = _scale(_parse_product(text, tokens), sign)
    while tokens and tokens[0] in OPERATORS:
        sign = OPERATORS[tokens.pop(0)]
        terms += _scale(_parse_product(text, tokens), sign)
    return terms


def _parse_product(text: str, tokens: list[str]) -> list[Term]:
    """Takes `arm`, `2 * arm` or `2 * (sum)` from the front of the tokens."""
    factor = 1.0
    if len(tokens) > 1 and tokens[1] == "*":
        try:
            factor = float(tokens[0])
        except ValueError:
            raise _not_a_sum(text) from None
        del tokens[:2]
    if not tokens or tokens[0] in (*OPERATORS, "*", ")"):
        raise _not_a_sum(text)
    token = tokens.pop(0)
    if token != "(":
        return [_parse_term(token, factor)]
    terms = _parse_sum(text, tokens)
    if not tokens or tokens.pop(0) != ")":
        raise _not_a_sum(text)
    return _scale(terms, factor)


def _parse_term(token: str, coefficient: float) -> Term:
    arm, _, score = token.partition("@")
    probe, colon, probe_score = score.partition(":")
    if colon:
        return Term(coefficient, arm, probe_score or None, probe)
    return Term(coefficient, arm, score or None)


def _scale(terms: Iterable[Term], factor: float) -> list[Term]:
    return [term._replace(coefficient=factor * term.coefficient) for term in terms]


def _not_a_sum(text: str) -> ConfigError:
    return ConfigError(
        f"{text!r} is not a sum of arms, such as 'a - b' or '(a - b) - 0.5 * (c - d)', with spaces "
        "around + and -."
    )
