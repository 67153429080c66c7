"""Report sections: scores, curves, types of questions, matching, and missing runs."""

from collections import Counter, defaultdict
from collections.abc import Mapping

from vlm_jax.infer.metrics.grounding import LAYER_NUMBERS
from vlm_jax.infer.metrics.scores import metric_keys, parse_score
from vlm_jax.infer.metrics.table import of_attention
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.study.matching import axis_label
from vlm_jax.study.report import figures, statistics
from vlm_jax.study.report.page import Cell, Section, Table
from vlm_jax.study.report.results import Results
from vlm_jax.study.report.statistics import Estimate, Pair
from vlm_jax.study.run import record

TESTS = (
    "Intervals are 95 %. Over seeds: Wilson's score interval of the scores, or of the differences "
    "seed by seed, with the variance of the seeds and the quantile of Student's t; it lies within "
    "the bounds of the metric, and holds for other seeds and these test questions. Seeds without "
    "spread determine no interval.",
    "Over images: a bootstrap of the test images, and a sign-flip test of them. They assume that "
    "the images are independent draws, and hold for other images and these trained models.",
    "Pairs are arms with the same test questions. p values are corrected for the number of pairs "
    "(Holm); intervals are not. A difference is significant if both p values are below 0.05: with "
    'few seeds, only a large and steady one is, and "not significant" does not mean equal.',
)
# p values below it are shown as "< 0.001".
SMALLEST_SHOWN_P = 0.001


def number_cell(text: str) -> Cell:
    return Cell(text, is_number=True)


def format_estimate(estimate: Estimate | None, sign: str = "") -> str:
    """0.796 (0.645 to 0.893); with `sign` "+", positive numbers have a sign, too."""
    if estimate is None:
        return "-"
    mean = f"{estimate.mean:{sign}.3f}"
    if estimate.low is None:
        return mean
    return f"{mean} ({estimate.low:{sign}.3f} to {estimate.high:{sign}.3f})"


def format_p(p: float | None, smallest: float = SMALLEST_SHOWN_P) -> str:
    """0.023, or "< 0.001" where the test cannot show less than `smallest`."""
    if p is None:
        return "-"
    return f"< {smallest:.3f}" if p < smallest else f"{p:.3f}"


def score_section(results: Results, axis: str, pairs: list[Pair]) -> Section:
    """Returns the scores of all arms on an axis, and the tests of every pair."""
    # The explanation precedes the first axis alone.
    is_first = axis == next(iter(results.plan.study.matched))
    return Section(
        f"Score at matched {axis_label(axis)}",
        TESTS if is_first else (),
        [figures.score_picture(results, axis)],
        [score_table(results, axis), pair_table(pairs)],
    )


def summary(results: Results, axis: str, pairs: list[Pair]) -> str:
    """Returns a paragraph with the highest score and the significant differences."""
    study = results.plan.study
    estimates = {}
    for arm in study.arms:
        scores = list(results.scores(axis, arm).values())
        if scores:
            estimates[arm] = statistics.estimate(scores, study.metric_bounds)
    if not estimates:
        return f"At matched {axis_label(axis)} no run is done yet."
    best = max(estimates, key=lambda arm: estimates[arm].mean)
    return (
        f"At matched {axis_label(axis)}, {best} has the highest {study.metric.replace('_', ' ')}, "
        f"{format_estimate(estimates[best])}. {_significant_differences(pairs)}."
    )


def _significant_differences(pairs: list[Pair]) -> str:
    worse_arms: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.is_significant:
            worse_arms.setdefault(pair.better, []).append(pair.worse)
    if not worse_arms:
        return f"None of {len(pairs)} pairs differs significantly"
    differences = [f"{arm} is better than {', '.join(worse)}" for arm, worse in worse_arms.items()]
    return f"Significant differences: {'; '.join(differences)}"


def curve_section(results: Results) -> Section:
    """Returns the training loss over steps, FLOPs and seconds."""
    text = (
        "Loss on the training batches, smoothed over a twentieth of the run: mean over seeds, and "
        "a band from the lowest seed to the highest. Seconds include the effect of other work on "
        "the machine."
    )
    pictures = []
    for axis in results.plan.study.matched:
        pictures += figures.curve_pictures(results, axis)
    return Section("Learning curves", [text], pictures)


def score_table(results: Results, axis: str) -> Table:
    """Returns a row for each arm: mean with interval, each seed, and shuffled images."""
    study = results.plan.study
    rows = []
    for arm in study.arms:
        scores = results.scores(axis, arm)
        shuffled = [result.shuffled_score for result in results.by_seed(axis, arm).values()]
        texts = ["-", f"0 of {study.seeds}", "-", "-"]
        if scores:
            texts = [
                format_estimate(statistics.estimate(list(scores.values()), study.metric_bounds)),
                f"{len(scores)} of {study.seeds}",
                ", ".join(f"{score:.3f}" for _, score in sorted(scores.items())),
                format_estimate(statistics.estimate(shuffled)),
            ]
        rows.append([Cell(arm), *map(number_cell, texts)])
    columns = [
        "arm",
        f"{study.metric}, mean over seeds",
        "seeds",
        "each",
        f"{_metric_title(results)} with shuffled images",
    ]
    return Table(columns, rows)


def layer_section(results: Results) -> Section | None:
    """Returns the attention on objects by layer; None without a metric of attention."""
    study, rows = results.plan.study, []
    metrics = of_attention(study.base.eval.metrics)
    if not metrics:
        return None
    for arm in study.arms:
        by_layer = defaultdict(list)  # a dict of numbers for each seed
        for run in results.by_seed(next(iter(study.matched)), arm).values():
            for layer, numbers in run.by_layer[metrics[0]].items():
                by_layer[layer].append(numbers)
        for layer, of_seeds in by_layer.items():
            cells = [Cell(arm), Cell(layer)]
            for name in LAYER_NUMBERS:
                values = [numbers[name] for numbers in of_seeds]
                cells.append(number_cell(format_estimate(statistics.estimate(values))))
            rows.append(cells)
    text = (
        "Attention of the right answers to questions about one object. Mass: share of the "
        "attention to the image that is on the object. Pointing: share of the patch with the most "
        "attention that the object covers. Image: share of the attention that is on the image; "
        "layers of self-attention (self) also attend to text. Intervals are over seeds."
    )
    table = Table(["arm", "layer", *LAYER_NUMBERS], rows)
    return Section("Attention by layer", [text], tables=[table])


def _metric_title(results: Results) -> str:
    return parse_score(results.plan.study.metric).metric.replace("_", " ")


def prerequisite_section(results: Results) -> Section | None:
    """Returns the scores of the prerequisites; None without any."""
    prerequisites = results.plan.prerequisites
    if not prerequisites:
        return None
    key = metric_keys(parse_score(results.plan.study.metric).metric).mean
    rows = []
    for name, cfg in prerequisites.items():
        file = Workdir(cfg.workdir).eval
        score = record.read_json(file).get(key) if file.exists() else None
        score_text = "-" if score is None else f"{score:.3f}"
        rows.append([Cell(name), number_cell(f"{cfg.train.steps:,}"), number_cell(score_text)])
    text = (
        "Trained once, with one seed, for all arms and seeds: results over seeds hold for arms "
        "that start from this run."
    )
    table = Table(["run", "steps", _metric_title(results)], rows)
    return Section("Prerequisites", [text], tables=[table])


def pair_table(pairs: list[Pair]) -> Table:
    """Returns a row for each pair of arms: differences with intervals, p values, verdict."""
    # Just above the smallest p value of resampling, corrected for the number of pairs.
    smallest = max(SMALLEST_SHOWN_P, 1.001 * len(pairs) * statistics.SMALLEST_P)
    rows = [
        [
            Cell(f"{pair.a} - {pair.b}"),
            number_cell(format_estimate(pair.seeds, "+")),
            number_cell(format_p(pair.seeds_p)),
            number_cell(format_estimate(pair.images, "+")),
            number_cell(format_p(pair.images_p, smallest)),
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
    """Returns the value of every arm on every axis, relative to the reference."""
    study = results.plan.study
    rows = [
        [
            Cell(match.axis),
            Cell(match.arm),
            Cell(match.field or "-"),
            number_cell("-" if match.number is None else f"{match.number:,}"),
            number_cell(f"{match.value:.6g}"),
            number_cell(f"{match.residual:+.2%}"),
        ]
        for match in results.plan.matches
    ]
    text = f"All arms are matched to {study.reference}, within {study.tolerance:.1%}."
    table = Table(["axis", "arm", "solved for", "solution", "value", "difference"], rows)
    return Section("Matching", [text], tables=[table])


def type_section(results: Results) -> Section:
    """Returns the metric by type of question."""
    arms = list(results.plan.study.arms)
    tables = []
    for axis in results.plan.study.matched:
        estimates = {arm: _type_estimates(results, axis, arm) for arm in arms}
        counts = {arm: _type_counts(results, axis, arm) for arm in arms}
        types: dict[str, None] = {}
        for arm_counts in counts.values():
            types |= dict.fromkeys(arm_counts)
        rows = []
        for question_type in types:
            cells = [_shaded_cell(estimates[arm].get(question_type)) for arm in arms]
            questions = number_cell(_format_counts(counts, question_type))
            rows.append([Cell(question_type), questions, *cells])
        caption = f"At matched {axis_label(axis)}"
        tables.append(Table(["type", "questions", *arms], rows, caption))
    title = _metric_title(results).capitalize()
    text = f"{title} by type of question, mean over seeds with its 95 % interval."
    return Section("Score by type of question", [text], tables=tables)


def _type_estimates(results: Results, axis: str, arm: str) -> dict[str, Estimate]:
    """Returns type of question -> mean over seeds."""
    by_type = [result.by_type for result in results.by_seed(axis, arm).values()]
    estimates = {}
    for question_type in by_type[0] if by_type else ():
        estimates[question_type] = statistics.estimate([seed[question_type] for seed in by_type])
    return estimates


def _type_counts(results: Results, axis: str, arm: str) -> Counter:
    """Returns type of question -> number of test questions."""
    runs = list(results.by_seed(axis, arm).values())
    return Counter(line["type"] for line in runs[0].predictions) if runs else Counter()


def _format_counts(counts: Mapping[str, Counter], question_type: str) -> str:
    """Returns the number of questions of a type, or its range over arms: '346' or '13 to 257'."""
    numbers = sorted({arm_counts[question_type] for arm_counts in counts.values() if arm_counts})
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"


def _shaded_cell(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell("-")
    # HTML has room for the interval below the mean only.
    text = format_estimate(estimate).replace(" (", "\n(")
    return Cell(text, shade=estimate.mean, is_number=True)


def missing_section(results: Results) -> Section | None:
    """Returns the runs that are not in the report, and why; None if all are."""
    rows = [
        [Cell(name), Cell(reason)] for name, reason in (results.missing | results.broken).items()
    ]
    if not rows:
        return None
    count = len(results.plan.runs())
    text = f"{len(rows)} of {count} runs are missing; this report is about the others."
    return Section("Missing runs", [text], tables=[Table(["run", "why"], rows)])
