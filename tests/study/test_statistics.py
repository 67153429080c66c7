"""Intervals respect the bounds of a metric, cover the mean, and agree with the p values."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from vlm_jax.infer.metrics.scores import Score, parse_score
from vlm_jax.study.report import statistics
from vlm_jax.study.report.results import Result, Results

UNBOUNDED = (-math.inf, math.inf)
BOUNDS = {
    "share": (0.0, 1.0),
    "difference": (-1.0, 1.0),
    "nats": (0.0, math.inf),
    "1-5": (1.0, 5.0),
}


def result(correct, images=None):
    """A run with these answers; two questions for each image unless `images` names it."""
    images = images if images is not None else [i // 2 for i in range(len(correct))]
    lines = [
        {
            "image_id": image,
            "question": f"{i}?",
            "answer": "yes",
            "type": "ab"[i % 2],
            "correct": bool(is_correct),
        }
        for i, (is_correct, image) in enumerate(zip(correct, images))
    ]
    return Result(float(np.mean(correct)), 0.0, {}, tuple(lines), (), {})


def awkward_scores(rng, low, high):
    """Scores of 1 to 6 seeds: spread over the range, at its ends, or next to them."""
    count = rng.integers(1, 7)
    shares = [
        rng.beta(*10 ** rng.uniform(-2, 1, 2), count),
        rng.integers(0, 2, count).astype(float),
        rng.choice([0, 1e-17, 1e-9, 0.5, 1 - 1e-16, 1.0], count),
    ][rng.integers(3)]
    width = high - low if math.isfinite(high) else 3.0
    return np.minimum(low + width * shares, high)


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_no_scores_have_an_interval_outside_the_bounds(bounds):
    rng = np.random.default_rng(0)
    low, high = bounds
    for _ in range(1500):
        estimate = statistics.estimate(awkward_scores(rng, low, high), bounds)
        if estimate.low is not None:
            assert low <= estimate.low <= estimate.mean + 1e-12
            assert estimate.mean - 1e-12 <= estimate.high <= high


def test_a_seed_that_learned_nothing_makes_a_wide_interval_within_the_bounds():
    """Student's t interval of these scores of the projector study is 0.030 to 1.102."""
    estimate = statistics.estimate([0.714, 0.319, 0.666])
    assert 0.1 < estimate.low < 0.319 and 0.714 < estimate.high < 0.95


def test_without_bounds_it_is_students_interval():
    """Three scores, t of 2 degrees of freedom: 4.3027."""
    estimate = statistics.estimate([0.5, 0.6, 0.7], UNBOUNDED)
    half_width = 4.30265273 * 0.1 / 3**0.5
    np.testing.assert_allclose(
        [estimate.mean, estimate.low, estimate.high],
        [0.6, 0.6 - half_width, 0.6 + half_width],
        rtol=1e-6,
    )


def test_of_single_answers_it_is_wilsons_interval():
    """For 0 and 1 as scores, in his formula z is replaced by t and n by n - 1."""
    scores = [1.0] * 9 + [0.0] * 3
    estimate = statistics.estimate(scores)
    n, share, quantile = len(scores) - 1, 0.75, stats.t.ppf(0.975, len(scores) - 1)
    center = (share + quantile**2 / (2 * n)) / (1 + quantile**2 / n)
    root = math.sqrt(share * (1 - share) / n + quantile**2 / (4 * n**2))
    half_width = quantile / (1 + quantile**2 / n) * root
    np.testing.assert_allclose(
        [estimate.low, estimate.high], [center - half_width, center + half_width]
    )


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("mean", "deviation"), [(0.8, 0.06), (0.97, 0.02), (0.6, 0.25), (0.3, 0.05)]
)
def test_the_interval_covers_the_mean_as_often_as_it_claims(mean, deviation, seeds):
    """Simulated seeds; percentiles of a bootstrap over 3 seeds cover it in 75 to 86 % of cases."""
    rng = np.random.default_rng(0)
    size = mean * (1 - mean) / deviation**2 - 1
    samples = rng.beta(mean * size, (1 - mean) * size, (800, seeds))
    estimates = map(statistics.estimate, samples)
    covered = np.mean([estimate.low <= mean <= estimate.high for estimate in estimates])
    assert 0.92 <= covered <= 0.98


def test_a_bootstrap_over_three_seeds_covers_the_mean_too_rarely():
    """The reason for the score interval; percentiles of all 27 resamples."""
    mean, rng = 0.8, np.random.default_rng(0)
    resamples = np.stack(np.meshgrid(*[range(3)] * 3)).reshape(3, -1)
    covered = []
    for scores in rng.beta(mean * 40, (1 - mean) * 40, (800, 3)):
        low, high = np.percentile(scores[resamples].mean(axis=0), [2.5, 97.5])
        covered.append(low <= mean <= high)
    assert np.mean(covered) < 0.86


def test_seeds_of_two_kinds_are_a_limit_of_three_seeds():
    """One seed in three learns nothing: three equal draws hide it."""
    rng = np.random.default_rng(0)
    learned = rng.random((800, 3)) < 2 / 3
    samples = np.clip(np.where(learned, 0.72, 0.3) + rng.normal(0, 0.03, (800, 3)), 0, 1)
    estimates = map(statistics.estimate, samples)
    covered = np.mean([estimate.low <= 0.58 <= estimate.high for estimate in estimates])
    assert 0.68 < covered < 0.8


def test_one_seed_has_no_interval():
    estimate = statistics.estimate([0.5])
    assert (estimate.mean, estimate.low, estimate.high) == (0.5, None, None)


def test_scores_without_spread_have_no_interval():
    assert statistics.estimate([1.0, 1.0, 1.0]) == statistics.Estimate(1.0)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), UNBOUNDED, (0.0, math.inf)])
def test_a_p_value_is_small_exactly_where_the_interval_excludes_zero(bounds):
    rng = np.random.default_rng(0)
    bounds = statistics.difference_bounds(bounds)
    verdicts = set()
    for _ in range(300):
        differences = np.clip(rng.normal(rng.normal(0, 0.3), 0.1, 3), -0.99, 0.99)
        mean = statistics.average(differences)
        estimate = mean.estimate(bounds)
        excludes_zero = not estimate.low <= 0 <= estimate.high
        assert (mean.p_unequal(0.0, bounds) < 0.05) == excludes_zero
        verdicts.add(excludes_zero)
    assert verdicts == {True, False}


def samples(*arms):
    """Samples of two arms, the second subtracted, as seed -> value."""
    return [
        {seed: sign * value for seed, value in enumerate(arm)} for sign, arm in zip((1, -1), arms)
    ]


def test_arms_that_share_parts_are_compared_seed_by_seed():
    """Without bounds, this is the paired t test."""
    a, b = np.random.default_rng(0).random((2, 4))
    difference = statistics.add(samples(a, b), is_paired=True)
    expected = stats.ttest_rel(a, b)
    assert difference.p_unequal(0.0, UNBOUNDED) == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    estimate = difference.estimate(UNBOUNDED)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    assert difference.p_unequal(0.0, (-1.0, 1.0)) != pytest.approx(expected.pvalue)


def test_arms_that_share_nothing_are_independent_samples():
    """Without bounds, this is Welch's test."""
    a, b = np.random.default_rng(0).random(5), np.random.default_rng(1).random(3)
    difference = statistics.add(samples(a, b), is_paired=False)
    expected = stats.ttest_ind(a, b, equal_var=False)
    assert difference.freedom == pytest.approx(expected.df)
    assert difference.p_unequal(0.0, UNBOUNDED) == pytest.approx(expected.pvalue)


@pytest.mark.parametrize(("gain", "p"), [(0.0, 1.0), (0.25, None)])
@pytest.mark.parametrize("is_paired", [True, False])
def test_differences_without_spread(gain, p, is_paired):
    difference = statistics.add(samples([0.5 + gain] * 2, [0.5] * 2), is_paired)
    assert difference.p_unequal(0.0, (-1.0, 1.0)) == p


def test_questions_of_an_image_count_together():
    """One image with ten questions is one draw, whose gain alone is not evidence."""
    one_image, own_images = [0] * 10 + [1], list(range(11))
    better, worse = [1] * 10 + [0], [0] * 11
    estimates = {}
    for name, images in (("one", one_image), ("own", own_images)):
        runs = [(result(better, images), result(worse, images))]
        estimates[name] = statistics.compare_images(runs, "exact_match")
    assert estimates["one"].mean == estimates["own"].mean == pytest.approx(10 / 11)
    assert estimates["one"].low < 0.2 and estimates["own"].low > 0.6


def test_equal_differences_of_all_images_have_an_interval_of_no_width():
    runs = [(result([1, 0] * 6), result([0, 0] * 6))]
    estimate = statistics.compare_images(runs, "exact_match")
    assert (estimate.mean, estimate.low, estimate.high) == (0.5, 0.5, 0.5)


def test_a_bootstrap_of_images_is_seeded():
    rng = np.random.default_rng(0)
    runs = [(result(rng.integers(0, 2, 40)), result(rng.integers(0, 2, 40)))]
    assert statistics.compare_images(runs, "exact_match") == statistics.compare_images(
        runs, "exact_match"
    )


def test_a_type_is_tested_alone():
    runs = [(result([1, 0] * 6), result([0, 0] * 6))]
    assert statistics.compare_images(runs, "by_type.a").mean == 1.0
    assert statistics.compare_images(runs, "by_type.b").mean == 0.0


def test_any_metric_with_a_value_for_each_answer_is_tested_over_images():
    names = ["exact_match", "by_type.count", "anls", "anls_by_type.count"]
    assert [parse_score(name) for name in names] == [
        Score("exact_match"),
        Score("exact_match", type="count"),
        Score("anls"),
        Score("anls", type="count"),
    ]
    run = result([1, 0, 1, 0])
    lines = tuple({**line, "anls": 0.5 + 0.5 * line["correct"]} for line in run.predictions)
    scored = Result(0.75, 0.0, {}, lines, (), {})
    assert scored.answer_values("anls_by_type.a") == [1.0, 1.0]
    assert scored.answer_values("anls") == [1.0, 0.5, 1.0, 0.5]
    assert statistics.compare_images([(scored, scored)], "anls").mean == 0.0


def test_a_metric_without_values_for_answers_is_not_tested_over_images():
    runs = [(result([1, 0]), result([1, 0]))]
    assert statistics.compare_images(runs, "image_shuffled_exact_match") is None


def test_arms_with_other_questions_are_not_a_pair():
    run = result([1, 0, 1, 1])
    other = result([1, 0, 1, 1], images=[5, 6, 7, 8])
    assert statistics.same_questions([(run, run), (run, run)])
    assert not statistics.same_questions([(run, run), (run, other)])
    arms = dict.fromkeys([("examples", arm) for arm in "abc"])
    runs = {"a": run, "b": run, "c": other}
    finished = {("examples", arm, seed): runs[arm] for arm in "abc" for seed in (0, 1)}
    study = SimpleNamespace(metric="exact_match", metric_bounds=(0.0, 1.0), shares_parts=False)
    results = Results(SimpleNamespace(arms=arms, study=study), finished, {}, {})
    assert [(pair.a, pair.b) for pair in statistics.pairs(results, "examples")] == [("a", "b")]


def test_holm_as_in_the_paper():
    """Sorted p values times 4, 3, 2, 1, never falling, at most 1."""
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": None}
    assert statistics.holm(p_values) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02, "e": None}
    )
