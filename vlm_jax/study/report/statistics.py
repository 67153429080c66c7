"""Confidence intervals and significance tests.

Over seeds, an interval is Wilson's score interval for a mean of few bounded scores
(`score_interval`), with the quantile of Student's t. With no bounds, it is Student's. Franco et al.
(2019, J. Survey Statistics and Methodology 7) recommend it for proportions of clustered samples. A
p value inverts the interval of a difference, so it is below 0.05 exactly where the 95 % interval
excludes 0.
A bootstrap over 3 seeds respects the bounds as well, but covers the mean in 75 to 85 % of cases.

Where the arms of a seed share pretrained parts, a difference is taken seed by seed. Elsewhere a
seed's number makes nothing equal, and Welch's test (1947, Biometrika 34) takes the arms as
independent samples.

Over test images, a percentile bootstrap, whose resampled means are all within the bounds.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from vlm_jax.infer.metrics.intervals import CONFIDENCE, Bounds, Estimate, score_interval
from vlm_jax.study.report.results import Result, Results

SIGNIFICANCE = 0.05
RESAMPLES = 9999
RESAMPLES_AT_ONCE = 500


@dataclass(frozen=True)
class Pair:
    """Difference of two arms on an axis: exploration, which is not tested."""

    a: str
    b: str
    seeds: Estimate  # score of a minus score of b, interval over seeds
    images: Estimate | None  # the same difference, interval over test images


@dataclass(frozen=True)
class Mean:
    """Mean over seeds, or a sum of such means, with its standard error."""

    mean: float
    error: float | None = None  # None: the seeds determine none
    freedom: float = math.inf  # degrees of freedom

    def estimate(self, bounds: Bounds) -> Estimate:
        """Returns the 95 % score interval, which lies within `bounds`."""
        if not self._has_error(bounds):
            return Estimate(self.mean)
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom))
        return Estimate(self.mean, *score_interval(self.mean, quantile * self.error, bounds))

    def p_above(self, null: float, bounds: Bounds) -> float | None:
        """Returns the one-sided p value against a mean of at most `null`, inside the bounds."""
        if not self._has_error(bounds):
            return None
        ratio = _variance(self.mean, bounds) / _variance(null, bounds)
        return float(stats.t.sf((self.mean - null) / self.error * math.sqrt(ratio), self.freedom))

    def p_unequal(self, null: float, bounds: Bounds) -> float | None:
        """Returns the two-sided p value against a mean of `null`."""
        if self.error == 0 and self.mean == null:
            return 1.0
        above = self.p_above(null, bounds)
        return None if above is None else 2 * min(above, 1 - above)

    def _has_error(self, bounds: Bounds) -> bool:
        return bool(self.error) and bounds[0] < self.mean < bounds[1]


def _variance(mean: float, bounds: Bounds) -> float:
    """v of the docstring of infer/metrics/intervals.py, up to a factor; 1 without bounds."""
    low, high = bounds
    below = 1.0 if math.isinf(low) else mean - low
    return below * (1.0 if math.isinf(high) else high - mean)


def average(scores: Sequence[float]) -> Mean:
    """Returns the mean over seeds."""
    mean = float(np.mean(scores))
    if len(scores) < 2:
        return Mean(mean)
    error = float(stats.sem(scores)) if np.ptp(scores) > 0 else 0.0
    return Mean(mean, error, len(scores) - 1)


def add(samples: Sequence[Mapping[int, float]], is_paired: bool) -> Mean:
    """Returns the sum of the means of several samples, each seed -> value.

    Args:
      is_paired: values of one seed belong together. Else the samples are independent, with the
        degrees of freedom of Welch and Satterthwaite.
    """
    if is_paired:
        return average(list(sums_by_seed(samples).values()))
    means = [average(list(sample.values())) for sample in samples]
    total = sum(mean.mean for mean in means)
    if any(mean.error is None for mean in means):
        return Mean(total)
    variances = [mean.error**2 for mean in means]
    if not sum(variances):
        return Mean(total, 0.0)
    freedom = sum(variances) ** 2 / sum(
        variance**2 / mean.freedom for variance, mean in zip(variances, means)
    )
    return Mean(total, math.sqrt(sum(variances)), freedom)


def sums_by_seed(samples: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Returns seed -> sum of the values of all samples, of the seeds that all have."""
    seeds = sorted(set.intersection(*map(set, samples)))
    return {seed: sum(sample[seed] for sample in samples) for seed in seeds}


def estimate(scores: Sequence[float], bounds: Bounds = (0.0, 1.0)) -> Estimate:
    """Returns the mean over seeds with its 95 % score interval, which lies within `bounds`.

    `bounds` of the scores are (low, high), (low, inf) or (-inf, inf). Without spread, as with one
    seed, the scores determine no interval.
    """
    return average(scores).estimate(bounds)


def difference_bounds(bounds: Bounds) -> Bounds:
    """Returns the bounds of a difference of two scores; a one-sided bound is none."""
    width = bounds[1] - bounds[0]
    return -width, width


def pairs(results: Results, axis: str) -> list[Pair]:
    """Returns every pair of arms with a common seed and the same test questions, in arm order."""
    study = results.plan.study
    arms = [arm for plan_axis, arm in results.plan.arms if plan_axis == axis]
    found = []
    for a, b in combinations(arms, 2):
        runs = _paired_runs(results.by_seed(axis, a), results.by_seed(axis, b))
        if not runs or not same_questions(runs):
            continue
        over_seeds = add(
            [results.scores(axis, a), _negative(results.scores(axis, b))], study.shares_parts
        ).estimate(difference_bounds(study.metric_bounds))
        found.append(Pair(a, b, over_seeds, compare_images(runs, study.metric)))
    return found


def _negative(sample: Mapping[int, float]) -> dict[int, float]:
    return {seed: -value for seed, value in sample.items()}


# Runs of two arms, a pair for each seed.
Runs = list[tuple[Result, Result]]


def _paired_runs(a: Mapping[int, Result], b: Mapping[int, Result]) -> Runs:
    return [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]


def same_questions(runs: Runs) -> bool:
    """Returns True if all runs answered the same questions about the same images."""
    questions = runs[0][0].questions
    return all(run.questions == questions for pair in runs for run in pair)


def compare_images(runs: Runs, metric: str) -> Estimate | None:
    """Returns the mean difference with a bootstrap interval over images.

    Answers about one image are correlated, so whole images are resampled. None for a metric
    without values for single answers.
    """
    difference = image_differences(runs, metric)
    if difference is None:
        return None
    totals, counts = difference
    mean = float(totals.sum() / counts.sum())
    if len(totals) < 2 or not totals.any():
        return Estimate(mean, mean, mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        bootstrap = stats.bootstrap(
            (totals, counts),
            _ratio,
            paired=True,
            method="percentile",
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=RESAMPLES_AT_ONCE,
            rng=np.random.default_rng(0),
        )
    interval = bootstrap.confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))


def image_differences(runs: Runs, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns two arrays over test images: summed differences a - b, and numbers of questions.

    Differences are means over seeds. None where a run has no values of the metric for its answers.
    """
    a_values = [a.answer_values(metric) for a, _ in runs]
    b_values = [b.answer_values(metric) for _, b in runs]
    if None in (*a_values, *b_values):
        return None
    differences = np.mean(np.array(a_values, float) - np.array(b_values, float), axis=0)
    image_ids = [str(line["image_id"]) for line in runs[0][0].answers(metric)]
    _, image_index = np.unique(image_ids, return_inverse=True)
    return np.bincount(image_index, differences), np.bincount(image_index).astype(float)


def _ratio(totals, counts, axis):
    return totals.sum(axis=axis) / counts.sum(axis=axis)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Returns p values corrected for their number (Holm 1979, Scand. J. Statistics 6)."""
    ranked = sorted((p, name) for name, p in p_values.items() if p is not None)
    corrected: dict[str, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (p, name) in enumerate(ranked):
        largest = max(largest, min(1.0, p * (len(ranked) - rank)))
        corrected[name] = largest
    return corrected
