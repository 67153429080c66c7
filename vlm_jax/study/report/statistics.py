"""Confidence intervals and significance tests.

Over seeds, an interval is Wilson's score interval for a mean of few bounded scores
(`score_interval`), with the quantile of Student's t. With no bounds, it is Student's. Franco et al.
(2019, J. Survey Statistics and Methodology 7) recommend it for proportions of clustered samples. A
p value inverts the interval of a difference, so it is below 0.05 exactly where the 95 % interval
excludes 0.
A bootstrap over 3 seeds respects the bounds as well, but covers the mean in 75 to 85 % of cases.

Over test images, a percentile bootstrap, whose resampled means are all within the bounds, and a
sign-flip test.
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
# The smallest p value that resampling can show.
SMALLEST_P = 2 / (RESAMPLES + 1)


@dataclass(frozen=True)
class Pair:
    """Difference of two arms on an axis; None where the data determine no value.

    p values are corrected for the number of pairs.
    """

    a: str
    b: str
    seeds: Estimate  # score of a minus score of b, interval over seeds
    seeds_p: float | None
    images: Estimate | None  # the same difference, interval over test images
    images_p: float | None

    @property
    def is_significant(self) -> bool:
        """True if the difference holds for other seeds and, where tested, for other images."""
        p_values = [p for p in (self.seeds_p, self.images_p) if p is not None]
        return self.seeds_p is not None and max(p_values) < SIGNIFICANCE

    @property
    def better(self) -> str:
        """The arm with the higher mean."""
        return self.a if self.seeds.mean > 0 else self.b

    @property
    def worse(self) -> str:
        """The arm with the lower mean."""
        return self.b if self.seeds.mean > 0 else self.a

    @property
    def verdict(self) -> str:
        if self.seeds_p is None:
            return "needs more seeds"
        return f"{self.better} is better" if self.is_significant else "not significant"


def estimate(scores: Sequence[float], bounds: Bounds = (0.0, 1.0)) -> Estimate:
    """Returns the mean over seeds with its 95 % score interval, which lies within `bounds`.

    `bounds` of the scores are (low, high), (low, inf) or (-inf, inf). Without spread, as with one
    seed, the scores determine no interval.
    """
    mean = float(np.mean(scores))
    if not _has_spread(scores, mean, bounds):
        return Estimate(mean)
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(scores) - 1)
    return Estimate(mean, *score_interval(mean, float(quantile * stats.sem(scores)), bounds))


def difference_bounds(bounds: Bounds) -> Bounds:
    """Returns the bounds of a difference of two scores; a one-sided bound is none."""
    width = bounds[1] - bounds[0]
    return -width, width


def zero_p_value(differences: Sequence[float], bounds: Bounds) -> float | None:
    """Returns the two-sided p value of a zero mean difference over seeds.

    None where the differences have no spread and are not 0.
    """
    mean = float(np.mean(differences))
    if len(differences) > 1 and np.ptp(differences) == 0 and mean == 0:
        return 1.0
    if not _has_spread(differences, mean, bounds):
        return None
    low, high = bounds
    # v(mean) / v(0), see the docstring of infer/metrics/intervals.py.
    shrinkage = 1.0 if math.isinf(low) else (mean - low) * (high - mean) / (-low * high)
    t_statistic = abs(mean) / stats.sem(differences) * math.sqrt(shrinkage)
    return float(2 * stats.t.sf(t_statistic, len(differences) - 1))


def _has_spread(values: Sequence[float], mean: float, bounds: Bounds) -> bool:
    return len(values) > 1 and np.ptp(values) > 0 and bounds[0] < mean < bounds[1]


def pairs(results: Results, axis: str) -> list[Pair]:
    """Returns every pair of arms with a common seed and the same test questions, in arm order."""
    study = results.plan.study
    arms = [arm for plan_axis, arm in results.plan.arms if plan_axis == axis]
    compared: dict[tuple[str, str], Runs] = {}
    for a, b in combinations(arms, 2):
        runs = _paired_runs(results.by_seed(axis, a), results.by_seed(axis, b))
        if runs and same_questions(runs):
            compared[a, b] = runs

    over_seeds = {
        names: compare_seeds(runs, study.metric_bounds) for names, runs in compared.items()
    }
    over_images = {names: compare_images(runs, study.metric) for names, runs in compared.items()}
    seeds_p = holm({names: p for names, (_, p) in over_seeds.items()})
    images_p = holm({names: p for names, (_, p) in over_images.items()})
    return [
        Pair(*names, over_seeds[names][0], seeds_p[names], over_images[names][0], images_p[names])
        for names in compared
    ]


# Runs of two arms, a pair for each seed.
Runs = list[tuple[Result, Result]]


def _paired_runs(a: Mapping[int, Result], b: Mapping[int, Result]) -> Runs:
    return [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]


def compare_seeds(runs: Runs, bounds: Bounds) -> tuple[Estimate, float | None]:
    """Returns the mean difference, paired by seed, with its score interval and its p value."""
    differences = [a.score - b.score for a, b in runs]
    bounds = difference_bounds(bounds)
    return estimate(differences, bounds), zero_p_value(differences, bounds)


def same_questions(runs: Runs) -> bool:
    """Returns True if all runs answered the same questions about the same images."""
    questions = runs[0][0].questions
    return all(run.questions == questions for pair in runs for run in pair)


def compare_images(runs: Runs, metric: str) -> tuple[Estimate | None, float | None]:
    """Returns the mean difference with a bootstrap interval and a sign-flip p value over images.

    Answers about one image are correlated, so whole images are resampled, and the two arms are
    swapped for whole images. None for a metric without values for single answers.
    """
    difference = image_differences(runs, metric)
    if difference is None:
        return None, None
    totals, counts = difference
    mean = float(totals.sum() / counts.sum())
    if len(totals) < 2 or not totals.any():
        return Estimate(mean, mean, mean), float(not totals.any())

    options = {
        "vectorized": True,
        "n_resamples": RESAMPLES,
        "batch": RESAMPLES_AT_ONCE,
        "rng": np.random.default_rng(0),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        bootstrap = stats.bootstrap(
            (totals, counts), _ratio, paired=True, method="percentile", **options
        )
    flips = stats.permutation_test((totals,), np.sum, permutation_type="samples", **options)
    interval = bootstrap.confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high)), float(flips.pvalue)


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


def holm(p_values: Mapping[tuple, float | None]) -> dict[tuple, float | None]:
    """Returns p values corrected for their number (Holm 1979, Scand. J. Statistics 6)."""
    ranked = sorted((p, names) for names, p in p_values.items() if p is not None)
    corrected: dict[tuple, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (p, names) in enumerate(ranked):
        largest = max(largest, min(1.0, p * (len(ranked) - rank)))
        corrected[names] = largest
    return corrected
