"""Intervals and tests are those of the textbooks."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from vlm_jax.study.report import statistics
from vlm_jax.study.report.results import Result, Results


def result(right, images=None):
    """A run whose answers are right where `right` says so; two questions an image if `images` does not say it."""
    images = images if images is not None else [i // 2 for i in range(len(right))]
    lines = [
        {
            "image_id": image,
            "question": f"{i}?",
            "answer": "yes",
            "type": "ab"[i % 2],
            "correct": bool(one),
        }
        for i, (one, image) in enumerate(zip(right, images))
    ]
    return Result(float(np.mean(right)), 0.0, {}, tuple(lines), (), {})


def test_an_interval_is_students():
    """3 scores, t of 2 degrees of freedom: 4.3027."""
    found = statistics.estimate([0.5, 0.6, 0.7])
    half = 4.30265273 * 0.1 / 3**0.5
    np.testing.assert_allclose(
        [found.mean, found.low, found.high], [0.6, 0.6 - half, 0.6 + half], rtol=1e-6
    )


def test_one_seed_has_no_interval():
    found = statistics.estimate([0.5])
    assert (found.mean, found.low, found.high) == (0.5, None, None)


def test_over_seeds_it_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 40)) < np.array([0.7, 0.5])[:, None, None]
    found, p = statistics.over_seeds_of([(result(x), result(y)) for x, y in zip(a, b)])
    assert p == pytest.approx(stats.ttest_rel(a.mean(axis=1), b.mean(axis=1)).pvalue)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert (p < 0.05) == (not found.low <= 0 <= found.high)


@pytest.mark.parametrize(("gain", "p"), [(0, 1.0), (1, None)])
def test_differences_without_spread(gain, p):
    runs = [(result([1, 1, 1, gain]), result([1, 1, 1, 0]))] * 2
    assert statistics.over_seeds_of(runs)[1] == p


def test_questions_of_an_image_count_together():
    """One image with ten questions is one draw: its gain alone is no evidence."""
    together, apart = [0] * 10 + [1], list(range(11))
    better, worse = [1] * 10 + [0], [0] * 11
    clustered = statistics.over_images_of(
        [(result(better, together), result(worse, together))], "exact_match"
    )
    single = statistics.over_images_of(
        [(result(better, apart), result(worse, apart))], "exact_match"
    )
    assert clustered[0].mean == single[0].mean == pytest.approx(10 / 11)
    assert clustered[1] > 0.5 and single[1] < 0.01


def test_over_images_it_is_the_sign_test():
    """Six images, a is better by the same on each: of 64 ways to flip signs two are as extreme."""
    runs = [(result([1, 0] * 6), result([0, 0] * 6))]
    found, p = statistics.over_images_of(runs, "exact_match")
    assert p == pytest.approx(2 / 64)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_a_type_is_tested_alone():
    runs = [(result([1, 0] * 6), result([0, 0] * 6))]
    assert statistics.over_images_of(runs, "by_type.a")[0].mean == 1.0
    assert statistics.over_images_of(runs, "by_type.b")[0].mean == 0.0


def test_arms_that_were_asked_otherwise_are_no_pair():
    one, other = result([1, 0, 1, 1]), result([1, 0, 1, 1], images=[5, 6, 7, 8])
    assert statistics.were_asked_the_same([(one, one), (one, one)])
    assert not statistics.were_asked_the_same([(one, one), (one, other)])
    arms = dict.fromkeys([("examples", arm) for arm in "abc"])
    found = {
        ("examples", arm, seed): other if arm == "c" else one for arm in "abc" for seed in (0, 1)
    }
    plan = SimpleNamespace(arms=arms, study=SimpleNamespace(metric="exact_match"))
    assert [
        (pair.a, pair.b) for pair in statistics.pairs(Results(plan, found, {}, {}), "examples")
    ] == [("a", "b")]


def test_a_score_that_no_answer_has_is_not_compared_by_image():
    assert statistics.over_images_of(
        [(result([1, 0]), result([1, 0]))], "image_shuffled_exact_match"
    ) == (None, None)


def test_holm_as_in_the_paper():
    """Sorted p values times 4, 3, 2, 1, never falling, at most 1."""
    values = {("a",): 0.01, ("b",): 0.04, ("c",): 0.03, ("d",): 0.005, ("e",): None}
    assert statistics.holm(values) == pytest.approx(
        {("a",): 0.03, ("b",): 0.06, ("c",): 0.06, ("d",): 0.02, ("e",): None}
    )


@pytest.mark.parametrize(
    ("seeds_p", "images_p", "said"),
    [
        (0.01, 0.01, "a is better"),
        (0.2, 0.01, "not told apart"),
        (0.01, 0.2, "not told apart"),
        (None, 0.01, "needs more seeds"),
    ],
)
def test_a_verdict_needs_both(seeds_p, images_p, said):
    pair = statistics.Pair("a", "b", statistics.Estimate(0.1, 0.05, 0.15), seeds_p, None, images_p)
    assert said in pair.verdict
