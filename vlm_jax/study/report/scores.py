"""The sections of a report about what was reached."""

from collections import Counter
from collections.abc import Mapping

from vlm_jax.runtime.workdir import Workdir
from vlm_jax.study.matching import axis_label
from vlm_jax.study.report import figures, statistics
from vlm_jax.study.report.page import Cell, Section, Table
from vlm_jax.study.report.results import Results
from vlm_jax.study.report.statistics import Estimate, Pair
from vlm_jax.study.run import record

TESTS = (
    "Intervals are 95 %. Over seeds: Student's t of the scores, or of the differences seed by seed; it assumes that "
    "these are independent and normal, and holds for other seeds and these test questions.",
    "Over images: a bootstrap of the test images, and a sign-flip test of them; they assume that the images are "
    "independent draws, and hold for other images and these trained models.",
    "Pairs are of arms that were asked the same. p values are corrected for the number of pairs (Holm); intervals are "
    "not, each is for its pair alone. A pair is told apart only where both p values are below 0.05: with few seeds "
    'only a large and steady difference is, and "not told apart" does not mean equal.',
)


def number(text: str) -> Cell:
    return Cell(text, is_number=True)


def interval(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return "-"
    mean = f"{estimate.mean:{sign}.3f}"
    return (
        mean
        if estimate.low is None
        else f"{mean} ({estimate.low:{sign}.3f} to {estimate.high:{sign}.3f})"
    )


def p_value(p: float | None, smallest: float = 0.001) -> str:
    """`smallest` is what can be told at the least."""
    return "-" if p is None else f"< {smallest:.3f}" if p < smallest else f"{p:.3f}"


def score_section(results: Results, axis: str, pairs: list[Pair]) -> Section:
    """Scores of all arms, and the tests of every pair."""
    explained = TESTS if axis == next(iter(results.plan.study.matched)) else ()  # once
    tables = [score_table(results, axis), pair_table(pairs)]
    return Section(
        f"Score at matched {axis_label(axis)}",
        explained,
        [figures.score_picture(results, axis)],
        tables,
    )


def summary(results: Results, axis: str, pairs: list[Pair]) -> str:
    """The finding on an axis, in a sentence."""
    study = results.plan.study
    means = {
        arm: statistics.estimate(list(found))
        for arm in study.arms
        if (found := results.scores(axis, arm).values())
    }
    if not means:
        return f"At matched {axis_label(axis)} no run is done yet."
    best = max(means, key=lambda arm: means[arm].mean)
    behind: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.worse:
            behind.setdefault(pair.better, []).append(pair.worse)
    told = "; ".join(f"{arm} is better than {', '.join(others)}" for arm, others in behind.items())
    return (
        f"At matched {axis_label(axis)}, the highest {study.metric.replace('_', ' ')} is that of {best}, "
        f"{interval(means[best])}. {told and f'Told apart: {told}' or f'None of {len(pairs)} pairs is told apart'}."
    )


def curve_section(results: Results) -> Section:
    """How the loss falls, over what was spent."""
    axes = results.plan.study.matched
    text = (
        "Loss on the training batches, smoothed over a twentieth of the run: the mean over seeds, and a band from the "
        "lowest to the highest. Seconds are those of the runs, beside whatever else the machine did."
    )
    pictures = [picture for axis in axes for picture in figures.curve_pictures(results, axis)]
    return Section("Learning curves", [text], pictures)


def score_table(results: Results, axis: str) -> Table:
    study, rows = results.plan.study, []
    for arm in study.arms:
        scores = results.scores(axis, arm)
        each = ", ".join(f"{score:.3f}" for _, score in sorted(scores.items()))
        blind = [result.blind for result in results.of(axis, arm).values()]
        means = [
            interval(statistics.estimate(found)) if found else "-"
            for found in (list(scores.values()), blind)
        ]
        texts = [means[0], f"{len(scores)} of {study.seeds}", each or "-", means[1]]
        rows.append([Cell(arm), *map(number, texts)])
    columns = [
        "arm",
        f"{study.metric}, mean over seeds",
        "seeds",
        "each",
        "exact match with shuffled images",
    ]
    return Table(columns, rows)


def first_section(results: Results) -> Section | None:
    """How well what arms build on answers; None where they build on nothing."""
    rows = []
    for name, cfg in results.plan.first.items():
        file = Workdir(cfg.workdir).eval
        score = record.read_json(file).get("exact_match") if file.exists() else None
        rows.append(
            [
                Cell(name),
                number(f"{cfg.train.steps:,}"),
                number("-" if score is None else f"{score:.3f}"),
            ]
        )
    text = (
        "Trained once, with one seed, for all arms and seeds: what is said of other seeds holds for arms that build on "
        "this very run."
    )
    table = Table(["run", "steps", "exact match"], rows)
    return Section("What arms build on", [text], tables=[table]) if rows else None


def pair_table(pairs: list[Pair]) -> Table:
    least = max(
        0.001, 1.001 * len(pairs) * statistics.SMALLEST_P
    )  # just above the smallest of all, corrected
    rows = [
        [
            Cell(f"{pair.a} - {pair.b}"),
            number(interval(pair.seeds, "+")),
            number(p_value(pair.seeds_p)),
            number(interval(pair.images, "+")),
            number(p_value(pair.images_p, least)),
            Cell(pair.verdict),
        ]
        for pair in pairs
    ]
    columns = [
        "pair",
        "difference (over seeds)",
        "p, seeds",
        "difference (over images)",
        "p, images",
        "verdict",
    ]
    return Table(columns, rows)


def matching_section(results: Results) -> Section:
    """How near every arm came to the reference."""
    rows = [
        [
            Cell(match.axis),
            Cell(match.arm),
            Cell(match.field or "-"),
            number("-" if match.number is None else f"{match.number:,}"),
            number(f"{match.value:.6g}"),
            number(f"{match.residual:+.2%}"),
        ]
        for match in results.plan.matches
    ]
    study = results.plan.study
    text = f"All arms are matched to {study.reference}; {study.tolerance:.1%} is the largest miss that is allowed."
    return Section(
        "Matching",
        [text],
        tables=[Table(["axis", "arm", "solved for", "found", "value", "miss"], rows)],
    )


def type_section(results: Results) -> Section:
    """Exact match by the type of the question, mean over seeds with its interval."""
    tables = []
    for axis in results.plan.study.matched:
        found = {arm: _of_types(results, axis, arm) for arm in results.plan.study.arms}
        counts = {arm: _counts(results, axis, arm) for arm in found}
        kinds = list(dict.fromkeys(kind for one in counts.values() for kind in one))
        rows = [
            [
                Cell(kind),
                number(_range(counts, kind)),
                *(_shaded(found[arm].get(kind)) for arm in found),
            ]
            for kind in kinds
        ]
        tables.append(Table(["type", "questions", *found], rows, f"At matched {axis_label(axis)}"))
    text = "Exact match, mean over seeds with its 95 % interval (Student's t), for each type and arm alone."
    return Section("Score by type of question", [text], tables=tables)


def _of_types(results: Results, axis: str, arm: str) -> dict[str, Estimate]:
    found = [result.by_type for result in results.of(axis, arm).values()]
    return {
        kind: statistics.estimate([one[kind] for one in found])
        for kind in (found[0] if found else ())
    }


def _counts(results: Results, axis: str, arm: str) -> Counter:
    """Type -> questions that an arm was asked of it."""
    runs = list(results.of(axis, arm).values())
    return Counter(line["type"] for line in (runs[0].predictions if runs else ()))


def _range(counts: Mapping[str, Counter], kind: str) -> str:
    """How many questions of a type there are; from the fewest to the most where arms were asked differently."""
    found = sorted({one[kind] for one in counts.values() if one})
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def _shaded(found: Estimate | None) -> Cell:
    """The interval stands below the mean, where a table has room for it."""
    return (
        Cell("-")
        if found is None
        else Cell(interval(found).replace(" (", "\n("), shade=found.mean, is_number=True)
    )


def missing_section(results: Results) -> Section | None:
    """What the report could not show; None where that is nothing."""
    rows = [[Cell(name), Cell(why)] for name, why in (results.missing | results.broken).items()]
    if not rows:
        return None
    total = len(results.plan.runs())
    text = f"{len(rows)} of {total} runs are missing; all that is said here is of the others."
    return Section("Missing runs", [text], tables=[Table(["run", "why"], rows)])
