"""How sure a score, and a difference of two scores, is."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from vlm_jax.study.report.results import Result, Results

CONFIDENCE, LEVEL = 0.95, 0.05
RESAMPLES, AT_ONCE = 9999, 500
SMALLEST_P = 2 / (RESAMPLES + 1)  # that resampling can tell


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and between which bounds it lies; None where one seed cannot tell."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Pair:
    """Two arms on an axis; None where it cannot be told."""

    a: str
    b: str
    seeds: Estimate  # score of a - score of b; bounds over seeds
    seeds_p: float | None  # of no difference; corrected for the number of pairs, as the other one
    images: Estimate | None  # the same difference; bounds over test images
    images_p: float | None

    @property
    def verdict(self) -> str:
        """What may be said of the pair."""
        if self.seeds_p is None:
            return "needs more seeds"
        return f"{self.better} is better" if self.worse else "not told apart"

    @property
    def better(self) -> str:
        """The arm with the higher mean."""
        return self.a if self.seeds.mean > 0 else self.b

    @property
    def worse(self) -> str:
        """The arm that is behind for other seeds, and for other images where that can be told; "" where neither."""
        known = [p for p in (self.seeds_p, self.images_p) if p is not None]
        if self.seeds_p is None or max(known) >= LEVEL:
            return ""
        return self.b if self.better == self.a else self.a


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and its interval by Student's t."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean)
    half = float(stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Estimate(mean, mean - half, mean + half)


def pairs(results: Results, axis: str) -> list[Pair]:
    """Every pair of arms that share a seed and were asked the same, in the order of the arms.

    p values are Holm's, of all these pairs of the axis.
    """
    arms = [arm for one, arm in results.plan.arms if one == axis]
    shared = {
        (a, b): _shared(results.of(axis, a), results.of(axis, b)) for a, b in combinations(arms, 2)
    }
    shared = {names: runs for names, runs in shared.items() if runs and were_asked_the_same(runs)}
    over_seeds = {names: over_seeds_of(runs) for names, runs in shared.items()}
    over_images = {
        names: over_images_of(runs, results.plan.study.metric) for names, runs in shared.items()
    }
    seeds_p = holm({names: p for names, (_, p) in over_seeds.items()})
    images_p = holm({names: p for names, (_, p) in over_images.items()})
    return [
        Pair(*names, over_seeds[names][0], seeds_p[names], over_images[names][0], images_p[names])
        for names in shared
    ]


Runs = list[tuple[Result, Result]]  # of two arms, a seed each


def _shared(a: Mapping[int, Result], b: Mapping[int, Result]) -> Runs:
    return [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]


def over_seeds_of(runs: Runs) -> tuple[Estimate, float | None]:
    """The difference with its interval, and the p value of a paired t test: both from the differences seed by seed."""
    found = [a.score - b.score for a, b in runs]
    if len(found) < 2:
        return estimate(found), None
    if np.ptp(found) == 0:  # t divides by their spread: without any, it cannot tell
        return estimate(found), None if found[0] else 1.0
    return estimate(found), float(stats.ttest_1samp(found, 0).pvalue)


def were_asked_the_same(runs: Runs) -> bool:
    """Whether all runs answered the same questions about the same images."""
    return all(run.asked == runs[0][0].asked for pair in runs for run in pair)


def over_images_of(runs: Runs, metric: str) -> tuple[Estimate | None, float | None]:
    """The difference with the interval of a bootstrap over test images, and the p value of a sign-flip test over them.

    Questions about one image are right or wrong together more often than others, so images are resampled, and within
    each the two arms change places. None where no single answer has the metric.
    """
    if metric != "exact_match" and not metric.startswith("by_type."):
        return None, None
    gain, count = by_image(
        runs, metric.removeprefix("by_type.") if metric != "exact_match" else None
    )
    mean = float(gain.sum() / count.sum())
    if len(gain) < 2 or not gain.any():
        return Estimate(mean, mean, mean), float(not gain.any())
    options = {
        "vectorized": True,
        "n_resamples": RESAMPLES,
        "batch": AT_ONCE,
        "rng": np.random.default_rng(0),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        bounds = stats.bootstrap(
            (gain, count), _ratio, paired=True, method="percentile", **options
        ).confidence_interval
    flipped = stats.permutation_test((gain,), np.sum, permutation_type="samples", **options)
    return Estimate(mean, float(bounds.low), float(bounds.high)), float(flipped.pvalue)


def by_image(runs: Runs, kind: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Of every test image: how many more answers of a than of b are right, a seed; and how many questions it has."""
    kept = [i for i, line in enumerate(runs[0][0].predictions) if kind in (None, line["type"])]
    right = np.array(
        [[[run.predictions[i]["correct"] for i in kept] for run in pair] for pair in runs], float
    )
    gain = (right[:, 0] - right[:, 1]).mean(axis=0)
    _, image = np.unique(
        [str(runs[0][0].predictions[i]["image_id"]) for i in kept], return_inverse=True
    )
    return np.bincount(image, gain), np.bincount(image).astype(float)


def _ratio(gain, count, axis):
    return gain.sum(axis=axis) / count.sum(axis=axis)


def holm(values: Mapping[tuple, float | None]) -> dict[tuple, float | None]:
    """p values such that one of them is below a level by chance alone at most so often (Holm 1979)."""
    known = sorted((p, names) for names, p in values.items() if p is not None)
    corrected: dict[tuple, float | None] = dict.fromkeys(values)
    largest = 0.0
    for rank, (p, names) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[names] = largest
    return corrected
