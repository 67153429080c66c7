"""Charts of a report, each narrow enough for a phone."""

import contextlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import ticker

from vlm_jax.infer.metrics.intervals import Estimate
from vlm_jax.infer.samples import pyplot
from vlm_jax.study import matching
from vlm_jax.study.matching import axis_label
from vlm_jax.study.report import statistics
from vlm_jax.study.report.curves import Series, column, seconds, smooth
from vlm_jax.study.report.page import Picture
from vlm_jax.study.report.results import Result, Results
from vlm_jax.study.report.versions import seed_groups
from vlm_jax.study.tuning import Sweep

WIDTH_INCHES = 4.6
HEIGHT_INCHES = 3.3
DPI = 160
LEGEND_COLUMNS = 2
LEGEND_ROW_INCHES = 0.18
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
# Colors of Okabe and Ito, safe for color-blind readers. A ninth arm has the first color, dashed.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8a7a00", "#444444")
DASHES = ("-", "--", ":")
RATE = "optim.learning_rate"
MARKERS = ("o", "D", "s", "^")  # of the groups of seeds
# Distance of the dots of seeds from the interval, as a share of the distance between two arms.
SEED_OFFSET = 0.24

SeedGroups = Mapping[str, Sequence[float]]  # label -> values of its seeds


@contextlib.contextmanager
def _figure(height_inches: float = HEIGHT_INCHES) -> Iterator[tuple]:
    """Yields axes and the file to which the figure is written at the end."""
    file = io.BytesIO()
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        yield axes, file
        figure.savefig(file, dpi=DPI, metadata={"Software": None})
        pyplot.close(figure)


def _line_styles(arms: Sequence[str]) -> dict[str, dict[str, str]]:
    """Returns arm -> its color and dashes."""
    styles = {}
    for i, arm in enumerate(arms):
        dashes = DASHES[i // len(COLORS) % len(DASHES)]
        styles[arm] = {"color": COLORS[i % len(COLORS)], "linestyle": dashes}
    return styles


def score_picture(results: Results, axis: str) -> Picture:
    """Returns a chart with a line for each arm: mean, interval, and a dot for each seed."""
    study = results.plan.study
    scores = {arm: seed_groups(results.plan, results.scores(axis, arm)) for arm in study.arms}
    png = _draw_scores(scores, study.metric_bounds, study.metric.replace("_", " "))
    label = axis_label(axis)
    caption = f"Mean over seeds with its 95 % interval, and every seed; at matched {label}"
    return Picture(f"score_{axis}.png", caption, png)


@dataclass(frozen=True)
class Row:
    """A contrast in a chart."""

    label: str
    estimate: Estimate
    seeds: SeedGroups  # differences
    margin: float | None = None  # of an equality


def contrast_picture(rows: Sequence[Row], label: str) -> Picture:
    """Returns a chart with a line for each contrast: mean, interval, and a dot for each seed."""
    labels = _seed_labels([row.seeds for row in rows])
    height = 0.9 + 0.42 * len(rows) + LEGEND_ROW_INCHES * len(labels)
    with _figure(height) as (axes, file):
        for y, row in enumerate(rows):
            color = COLORS[y % len(COLORS)]
            if row.margin is not None:
                axes.plot([-row.margin, row.margin], [y, y], color=color, alpha=0.2, linewidth=9)
            _draw_seeds(axes, y, row.seeds, color)
            _draw_estimate(axes, y, row.estimate, color)
        axes.axvline(0, color="#444444", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(label)
        _add_seed_legend(axes, labels)
    caption = (
        "Contrasts with their published signs: mean over seeds with its 95 % interval, every seed, "
        "and as a band the margin of an equality"
    )
    return Picture("contrasts.png", caption, file.getvalue())


def sweep_picture(sweep: Sweep) -> Picture | None:
    """Returns a chart of the score over the learning rate; None if no candidate sets one.

    An arm has a line for each combination of its other candidate fields.
    """
    lines: dict[str, dict[float, float]] = {}  # label -> rate -> score
    for arm, candidates in sweep.arms.items():
        for overrides, score in candidates:
            others = {name: value for name, value in overrides.items() if name != RATE}
            values = dict.fromkeys(map(str, others.values()))
            label = " ".join([arm, *(["x"] if values else []), *values])
            if RATE in overrides and score is not None:
                lines.setdefault(label, {})[overrides[RATE]] = score
    if not lines:
        return None
    styles = _line_styles(list(lines))
    legend_rows = -(-len(lines) // LEGEND_COLUMNS)
    with _figure(HEIGHT_INCHES + LEGEND_ROW_INCHES * legend_rows) as (axes, file):
        for label, line in lines.items():
            rates = sorted(line)
            scores = [line[rate] for rate in rates]
            axes.plot(rates, scores, label=label, marker="o", markersize=4, **styles[label])
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel(sweep.metric.replace("_", " "))
        axes.figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS)
    caption = "Score of the candidates over the learning rate; x: the other fields that were tuned"
    return Picture("learning_rates.png", caption, file.getvalue())


def _draw_scores(scores: Mapping[str, SeedGroups], bounds: statistics.Bounds, label: str) -> bytes:
    """Returns the PNG of a chart of arm -> scores of its seeds."""
    styles = _line_styles(list(scores))
    labels = _seed_labels(scores.values())
    height = 0.8 + 0.36 * len(scores) + LEGEND_ROW_INCHES * len(labels)
    with _figure(height) as (axes, file):
        for row, (arm, groups) in enumerate(scores.items()):
            color, values = styles[arm]["color"], list(itertools.chain(*groups.values()))
            if values:
                _draw_seeds(axes, row, groups, color)
                _draw_estimate(axes, row, statistics.estimate(values, bounds), color)
        axes.set_yticks(range(len(scores)), list(scores))
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(label)
        _add_seed_legend(axes, labels)
    return file.getvalue()


def _draw_seeds(axes, row: int, groups: SeedGroups, color: str) -> None:
    for marker, values in zip(itertools.cycle(MARKERS), groups.values()):
        offsets = [row + SEED_OFFSET] * len(values)
        axes.scatter(values, offsets, s=16, color=color, marker=marker, alpha=0.6, linewidths=0)


def _seed_labels(rows: Iterable[SeedGroups]) -> list[str]:
    """Returns the labels of the groups, none if all seeds are alike."""
    labels = list(dict.fromkeys(itertools.chain(*rows)))
    return labels if len(labels) > 1 else []


def _add_seed_legend(axes, labels: Sequence[str]) -> None:
    handles = []
    for marker, label in zip(itertools.cycle(MARKERS), labels):
        handles.append(axes.scatter([], [], s=16, color="#666666", marker=marker, label=label))
    if handles:
        axes.figure.legend(handles=handles, loc="outside lower center")


def _draw_estimate(axes, row: int, estimate: Estimate, color: str) -> None:
    errors = None
    if estimate.low is not None:
        errors = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]
    axes.errorbar(estimate.mean, row, xerr=errors, fmt="o", color=color, markersize=6, capsize=3)


def curve_pictures(results: Results, axis: str) -> list[Picture]:
    """Returns charts of the training loss over steps, over FLOPs and over seconds."""
    plan = results.plan
    runs = {}
    for arm in plan.study.arms:
        arm_runs = list(results.by_seed(axis, arm).values())
        if arm_runs and all(run.metrics for run in arm_runs):
            runs[arm] = arm_runs
    if not runs:
        return []

    def flops(arm: str) -> Series:
        flops_per_step = matching.flops_per_step(plan.resolve(plan.arms[axis, arm]))
        return lambda result: column(result, "step") * flops_per_step

    # Label of the horizontal axis -> its values for the runs of an arm.
    horizontal: dict[str, Callable[[str], Series]] = {
        "training steps": lambda arm: lambda result: column(result, "step"),
        "training FLOPs": flops,
        "seconds": lambda arm: seconds,
    }
    styles = _line_styles(list(plan.study.arms))
    return [
        Picture(
            f"loss_over_{label.split()[-1].lower()}_{axis}.png",
            f"Loss over {label}, at matched {axis_label(axis)}",
            _draw_curves(runs, styles, label, series),
        )
        for label, series in horizontal.items()
    ]


def _draw_curves(
    runs: Mapping[str, Sequence[Result]],
    styles: Mapping[str, Mapping[str, str]],
    label: str,
    series: Callable[[str], Series],
) -> bytes:
    legend_rows = -(-len(runs) // LEGEND_COLUMNS)
    with _figure(HEIGHT_INCHES + LEGEND_ROW_INCHES * legend_rows) as (axes, file):
        for arm, arm_runs in runs.items():
            # Curves end where the shortest run does.
            points = min(len(run.metrics) for run in arm_runs)
            x = np.mean([series(arm)(run)[:points] for run in arm_runs], axis=0)
            losses = np.stack([smooth(column(run, "loss")[:points]) for run in arm_runs])
            low, high = losses.min(axis=0), losses.max(axis=0)
            axes.plot(x, losses.mean(axis=0), label=arm, linewidth=1.6, **styles[arm])
            axes.fill_between(x, low, high, color=styles[arm]["color"], alpha=0.18, lw=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlabel(label)
        axes.set_ylabel("training loss, nats")
        # Inside the axes, the legend of many arms would hide a curve.
        axes.figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS)
    return file.getvalue()
