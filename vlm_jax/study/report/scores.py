"""Report sections: scores, curves, types of questions, matching, and missing runs."""

from collections import Counter, defaultdict
from collections.abc import Mapping

from vlm_jax.data.synthetic import blind_baselines
from vlm_jax.data.synthetic.blind_baselines import Asked
from vlm_jax.infer.metrics.grounding import LAYER_NUMBERS
from vlm_jax.infer.metrics.scores import DEFAULT_METRIC, metric_keys, parse_score, score_bounds
from vlm_jax.infer.metrics.table import of_attention
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.study.definition import SPLIT_OF_CHOICES
from vlm_jax.study.matching import axis_label
from vlm_jax.study.report import figures, statistics
from vlm_jax.study.report.page import Cell, Section, Table, number_cell
from vlm_jax.study.report.results import Results
from vlm_jax.study.report.statistics import Estimate, Pair
from vlm_jax.study.run import record
from vlm_jax.study.tuning import SEED, Sweep

TESTS = (
    "Intervals are 95 %. Over seeds: Wilson's score interval of the scores, or of the differences, "
    "with the variance of the seeds and the quantile of Student's t; it lies within the bounds of "
    "the metric, and holds for other seeds and these test questions. Seeds without spread "
    "determine no interval.",
    "Over images: a bootstrap of the test images. It assumes that the images are independent "
    "draws, and holds for other images and these trained models.",
    "Pairs are arms with the same test questions. They are exploration: of many pairs, some "
    "intervals exclude 0 by chance, and an interval with 0 does not mean equal.",
)
# p values below it are shown as "< 0.001".
SMALLEST_SHOWN_P = 0.001


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
    """Returns the scores of all arms on an axis, and the difference of every pair."""
    # The explanation precedes the first axis alone.
    is_first = axis == next(iter(results.plan.study.matched))
    return Section(
        f"Score at matched {axis_label(axis)}",
        TESTS if is_first else (),
        [figures.score_picture(results, axis)],
        [score_table(results, axis), pair_table(pairs)],
    )


def summary(results: Results, axis: str) -> str:
    """Returns a paragraph with the highest score."""
    study = results.plan.study
    estimates = {}
    for arm in study.arms:
        scores = list(results.scores(axis, arm).values())
        if scores:
            estimates[arm] = statistics.estimate(scores, study.metric_bounds)
    if not estimates:
        return f"At matched {axis_label(axis)} no run is done yet."
    choose, extreme = (max, "highest") if study.higher_is_better else (min, "lowest")
    best = choose(estimates, key=lambda arm: estimates[arm].mean)
    metric = study.metric.replace("_", " ")
    return (
        f"At matched {axis_label(axis)}, {best} has the {extreme} {metric}, "
        f"{format_estimate(estimates[best])}. The study names no contrast: it is exploration."
    )


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
                format_estimate(statistics.estimate(shuffled, study.metric_bounds)),
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
    plan = results.plan
    if not plan.prerequisites:
        return None
    key = metric_keys(parse_score(plan.study.metric).metric).mean
    rows = []
    for name, versions in plan.prerequisites.items():
        scores = []
        for seed in range(plan.study.seeds):
            file = Workdir(plan.prerequisite(name, seed).cfg.workdir).eval
            score = record.read_json(file).get(key) if file.exists() else None
            scores.append("-" if score is None else f"{score:.3f}")
        steps = dict.fromkeys(f"{version.train.steps:,}" for version in versions)
        rows.append([Cell(name), *map(number_cell, (", ".join(steps), ", ".join(scores)))])
    text = "Each seed trains these first, and all of its arms start from them."
    if any(len(versions) > 1 for versions in plan.prerequisites.values()):
        text += " The seeds take the versions of a run in turn."
    table = Table(["run", "steps", f"{_metric_title(results)}, each seed"], rows)
    return Section("Prerequisites", [text], tables=[table])


def probe_section(results: Results) -> Section | None:
    """Returns the scores of each arm on the questions of the probes; None without any."""
    tables = []
    for probe in results.plan.probes:
        for axis in results.plan.study.matched:
            tables.append(probe_table(results, axis, probe.name))
    if not tables:
        return None
    text = (
        "Other questions, asked of the finished runs: mean over seeds with its 95 % interval; "
        "exact match by type of question."
    )
    return Section("Probes", [text], tables=tables)


def probe_table(results: Results, axis: str, probe: str) -> Table:
    """Returns a row for each arm: the study's metric of a probe, and exact match by type."""
    study = results.plan.study
    own = metric_keys(parse_score(study.metric).metric).mean
    names, by_type = {own: own.replace("_", " ")}, metric_keys(DEFAULT_METRIC).by_type
    for arm in study.arms:
        for run in results.by_seed(axis, arm).values():
            names |= {f"{by_type}.{kind}": kind for kind in run.probes[probe].get(by_type, ())}
    rows = []
    for arm in study.arms:
        scores = [results.other_scores(axis, arm, name, probe) for name in names]
        rows.append([Cell(arm), *map(_mean_cell, scores, map(score_bounds, names))])
    return Table(["arm", *names.values()], rows, f"{probe}, at matched {axis_label(axis)}")


def _mean_cell(scores: Mapping[int, float], bounds: statistics.Bounds) -> Cell:
    if not scores:
        return number_cell("-")
    return number_cell(format_estimate(statistics.estimate(list(scores.values()), bounds)))


def sweep_section(results: Results, sweep: Sweep | None) -> Section | None:
    """Returns the scores of all candidates for the learning rates; None without candidates."""
    study = results.plan.study
    if not study.tune:
        return None
    if sweep is None:
        return Section("Learning rates", ["Not tuned yet: every arm has its first candidate."])
    rows = []
    for arm, candidates in sweep.arms.items():
        chosen = sweep.best(study, arm)
        for i, (overrides, score) in enumerate(candidates):
            settings = ", ".join(f"{name} {value}" for name, value in overrides.items())
            score_text = "failed" if score is None else f"{score:.4f}"
            mark = "chosen" if i == chosen else ""
            rows.append([Cell(arm), Cell(settings), number_cell(score_text), Cell(mark)])
    text = (
        f"Candidates of each arm, trained once with seed {SEED} and scored on the "
        f"{SPLIT_OF_CHOICES} split, on {sweep.date}: {sweep.command}"
    )
    metric = sweep.metric.replace("_", " ")
    table = Table(["arm", "candidate", f"{metric}, {SPLIT_OF_CHOICES}", ""], rows)
    picture = figures.sweep_picture(sweep)
    return Section("Learning rates", [text], [picture] if picture else [], [table])


def pair_table(pairs: list[Pair]) -> Table:
    """Returns a row for each pair of arms: differences with intervals."""
    rows = [
        [
            Cell(f"{pair.a} - {pair.b}"),
            number_cell(format_estimate(pair.seeds, "+")),
            number_cell(format_estimate(pair.images, "+")),
        ]
        for pair in pairs
    ]
    columns = ["pair", "difference (over seeds)", "difference (over images)"]
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


def type_section(results: Results) -> Section | None:
    """Returns every metric by type of question; None without types."""
    tables = []
    for axis in results.plan.study.matched:
        for metric in of_types(results):
            tables.append(type_table(results, axis, metric))
    tables = [table for table in tables if table.rows]
    if not tables:
        return None
    text = (
        "Mean over seeds with its 95 % interval. Floor: exact match of the best reader that "
        "ignores what is asked. It gives all questions of a type one answer, repeats their k-th "
        "word, or names the k-th word of the page."
    )
    return Section("Score by type of question", [text], tables=tables)


def of_types(results: Results) -> list[str]:
    """Returns the metrics of the study that have a mean for each type of question."""
    metrics = results.plan.study.base.eval.metrics
    own = parse_score(results.plan.study.metric).metric
    return list(dict.fromkeys((own, *metrics)))


def type_table(results: Results, axis: str, metric: str) -> Table:
    """Returns a row for each type of question: number, floor, and the mean of each arm."""
    arms = list(results.plan.study.arms)
    estimates = {arm: _type_estimates(results, axis, arm, metric) for arm in arms}
    counts = {arm: _type_counts(results, axis, arm) for arm in arms}
    floors = {arm: _floors(results, axis, arm) for arm in arms}
    types: dict[str, None] = {}
    for arm_counts in counts.values():
        types |= dict.fromkeys(arm_counts)
    has_floor = metric == DEFAULT_METRIC
    rows = []
    for question_type in types:
        numbers = [_format_range(counts, question_type, ",")]
        numbers += [_format_range(floors, question_type, ".3f")] if has_floor else []
        cells = [_shaded_cell(estimates[arm].get(question_type), metric) for arm in arms]
        rows.append([Cell(question_type), *map(number_cell, numbers), *cells])
    columns = ["type", "questions", *(["floor"] if has_floor else []), *arms]
    title = metric.replace("_", " ").capitalize()
    return Table(columns, rows, f"{title} at matched {axis_label(axis)}")


def _type_estimates(results: Results, axis: str, arm: str, metric: str) -> dict[str, Estimate]:
    """Returns type of question -> mean over seeds."""
    key = metric_keys(metric).by_type
    by_type = [result.scores.get(key, {}) for result in results.by_seed(axis, arm).values()]
    estimates = {}
    for question_type in by_type[0] if by_type else ():
        scores = [seed[question_type] for seed in by_type if question_type in seed]
        estimates[question_type] = statistics.estimate(scores, score_bounds(metric))
    return estimates


def _type_counts(results: Results, axis: str, arm: str) -> dict[str, int]:
    """Returns type of question -> number of test questions."""
    return Counter(asked.type for asked in _asked(results, axis, arm))


def _floors(results: Results, axis: str, arm: str) -> dict[str, float]:
    return blind_baselines.floors(_asked(results, axis, arm))


def _asked(results: Results, axis: str, arm: str) -> list[Asked]:
    """Returns the test questions of an arm."""
    runs = list(results.by_seed(axis, arm).values())
    lines = runs[0].predictions if runs else ()
    return [Asked(*(line[name] for name in Asked._fields)) for line in lines]


def _format_range(by_arm: Mapping[str, Mapping], question_type: str, form: str) -> str:
    """Returns the number of a type of question, or its range over arms: '346' or '13 to 257'."""
    numbers = [numbers[question_type] for numbers in by_arm.values() if question_type in numbers]
    texts = dict.fromkeys(f"{number:{form}}" for number in (min(numbers), max(numbers)))
    return " to ".join(texts)


def _shaded_cell(estimate: Estimate | None, metric: str) -> Cell:
    if estimate is None:
        return Cell("-")
    # HTML has room for the interval below the mean only.
    text = format_estimate(estimate).replace(" (", "\n(")
    is_share = score_bounds(metric) == (0.0, 1.0)
    return Cell(text, shade=estimate.mean if is_share else None, is_number=True)


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
