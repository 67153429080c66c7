"""95 % intervals of means, shares and other numbers that lie within bounds.

The interval of a mean is Wilson's score interval: all mu with

    |mean - mu| <= half_width * sqrt(v(mu) / v(mean)),   v(mu) = (mu - low) * (high - mu)

for scores in [low, high]. It stays within the bounds for any scores, because v is 0 there. For
scores that are 0 or 1 it is the interval of Wilson (1927, J. Am. Stat. Assoc. 22). For others it is
the same with the effective sample size of Korn and Graubard (1998, Survey Methodology 24).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

import numpy as np

CONFIDENCE = 0.95
QUANTILE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
RESAMPLES = 1000
MOST_GROUPS = 500  # of answers that are resampled together

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; the ends are None where the data determine none."""

    mean: float
    low: float | None = None
    high: float | None = None


def estimate_mean(values: Sequence[float], bounds: Bounds = (0.0, 1.0)) -> Estimate:
    """Returns the mean of the scores of independent answers with its interval.

    Equal scores have no spread to estimate an interval from. They get the interval of scores at the
    bounds with the same mean, the widest.
    """
    mean = fmean(values)
    scores = np.asarray(values, float)
    low, high = bounds
    # Rounding can put the mean of scores at a bound beyond it.
    inside = min(max(mean, low), high)
    largest_variance = (inside - low) * (high - inside)
    relative_variance = 1.0
    if np.ptp(scores) > 0 and largest_variance > 0:
        relative_variance = float(np.var(scores)) / largest_variance
    spread = QUANTILE**2 / len(values) * relative_variance * (high - low)
    return Estimate(mean, *_solve(inside, spread, bounds))


def estimate_share(count: int, total: int) -> Estimate:
    """Returns `count / total` with Wilson's interval; without any trial 0, and any share."""
    if not total:
        return Estimate(0.0, 0.0, 1.0)
    share = count / total
    return Estimate(share, *_solve(share, QUANTILE**2 / total, (0.0, 1.0)))


def estimate_of_sums(counts: np.ndarray, function: Callable[[np.ndarray], float]) -> Estimate:
    """Returns a function of summed counts with a percentile bootstrap interval over the answers.

    Of many answers, random groups of equal size are resampled: their sums vary like those of single
    answers.

    Args:
      counts: (answers, kinds of counts).
      function: (kinds of counts,) -> a number.
    """
    rng = np.random.default_rng(0)
    groups = np.array_split(rng.permutation(counts), min(MOST_GROUPS, len(counts)))
    sums = np.array([group.sum(axis=0) for group in groups])  # (groups, kinds)
    weights = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), RESAMPLES)
    resampled = [function(resampled_sums) for resampled_sums in weights @ sums]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return Estimate(function(counts.sum(axis=0)), float(low), float(high))


def score_interval(mean: float, half_width: float, bounds: Bounds) -> Bounds:
    """Returns the score interval around a mean inside the bounds.

    Args:
      mean: of the scores.
      half_width: of the symmetric interval, a quantile times the standard error.
      bounds: of the scores, (low, high), (low, inf) or (-inf, inf).
    """
    low, _ = bounds
    if math.isinf(low):
        return mean - half_width, mean + half_width
    return _solve(mean, half_width**2 / ((mean - low) * _share_above(mean, bounds)), bounds)


def _solve(mean: float, spread: float, bounds: Bounds) -> Bounds:
    """Returns the ends of the score interval, which solve a quadratic equation.

    `spread` is half_width**2 / ((mean - low) * share_above), which may be positive at a bound, too.
    """
    low, high = bounds
    # In these forms, both ends are within the bounds in floating point, too.
    below = mean - low
    above = high - mean
    root = math.sqrt(spread * below * _share_above(mean, bounds) + spread**2 / 4)
    reach = below + spread / 2 + root
    upper = low + reach if math.isinf(high) else high - above**2 / (above + spread / 2 + root)
    return low + below**2 / reach, upper


def _share_above(mean: float, bounds: Bounds) -> float:
    """Distance of the mean from the upper bound, divided by the width; 1 without upper bound."""
    low, high = bounds
    return 1.0 if math.isinf(high) else (high - mean) / (high - low)
