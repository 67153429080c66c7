"""The charts of a report, each narrow enough for a phone."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from matplotlib import ticker

from vlm_jax.infer.samples import pyplot
from vlm_jax.study import matching
from vlm_jax.study.matching import axis_label
from vlm_jax.study.report import statistics
from vlm_jax.study.report.page import Picture
from vlm_jax.study.report.results import Result, Results

WIDTH_INCHES, HEIGHT_INCHES, DPI = 4.6, 3.3, 160
LEGEND_COLUMNS, LEGEND_ROW_INCHES = 2, 0.18
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
# Okabe and Ito's colours, which the colour-blind tell apart; a ninth arm begins again with dashes.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8a7a00", "#444444")
DASHES = ("-", "--", ":")
SEEDS_BELOW = (
    0.24  # of the distance between two arms: where the dots of seeds stand, off the mean's interval
)
SMOOTHED_SHARE = 1 / 20  # of the logged steps that one point of a curve is the mean of


@contextlib.contextmanager
def _figure(height_inches: float = HEIGHT_INCHES) -> Iterator[tuple]:
    """Axes to draw on and the file that they are written to."""
    file = io.BytesIO()
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        yield axes, file
        figure.savefig(file, dpi=DPI, metadata={"Software": None})
        pyplot.close(figure)


def _looks(arms: Sequence[str]) -> dict[str, dict[str, str]]:
    return {
        arm: {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
        for i, arm in enumerate(arms)
    }


def score_picture(results: Results, axis: str) -> Picture:
    """A line an arm: the mean with its interval, and every seed as a small dot."""
    study = results.plan.study
    arms, looks = list(study.arms), _looks(list(study.arms))
    with _figure(height_inches=0.8 + 0.36 * len(arms)) as (axes, file):
        for place, arm in enumerate(arms):
            scores = list(results.scores(axis, arm).values())
            if not scores:
                continue
            found, color = statistics.estimate(scores), looks[arm]["color"]
            axes.scatter(
                scores,
                [place + SEEDS_BELOW] * len(scores),
                s=14,
                color=color,
                alpha=0.6,
                linewidths=0,
            )
            bounds = (
                None if found.low is None else [[found.mean - found.low], [found.high - found.mean]]
            )
            axes.errorbar(
                found.mean, place, xerr=bounds, fmt="o", color=color, markersize=6, capsize=3
            )
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(study.metric.replace("_", " "))
    return Picture(
        f"score_{axis}.png",
        f"Mean over seeds with its 95 % interval, and every seed; at matched {axis_label(axis)}",
        file.getvalue(),
    )


def curve_pictures(results: Results, axis: str) -> list[Picture]:
    """Training loss over steps, over FLOPs and over seconds: the mean over seeds, from the lowest to the highest."""
    plan = results.plan

    def flops(arm: str) -> Callable[[Result], np.ndarray]:
        a_step = matching.flops_a_step(plan.built(plan.arms[axis, arm]))
        return lambda result: _column(result, "step") * a_step

    ways = {
        "training steps": lambda arm: lambda result: _column(result, "step"),
        "training FLOPs": flops,
        "seconds": lambda arm: _seconds,
    }
    found = {arm: list(results.of(axis, arm).values()) for arm in plan.study.arms}
    found = {arm: runs for arm, runs in found.items() if runs and all(run.metrics for run in runs)}
    if not found:
        return []
    return [
        Picture(
            f"loss_over_{label.split()[-1].lower()}_{axis}.png",
            f"Loss over {label}, at matched {axis_label(axis)}",
            _curves(found, _looks(list(plan.study.arms)), label, way),
        )
        for label, way in ways.items()
    ]


def _curves(
    found: Mapping[str, Sequence[Result]], looks: Mapping, label: str, x_of: Callable
) -> bytes:
    legend_rows = -(-len(found) // LEGEND_COLUMNS)
    with _figure(HEIGHT_INCHES + LEGEND_ROW_INCHES * legend_rows) as (axes, file):
        for arm, runs in found.items():
            points = min(len(run.metrics) for run in runs)
            x = np.mean([x_of(arm)(run)[:points] for run in runs], axis=0)
            losses = np.stack([_smoothed(_column(run, "loss")[:points]) for run in runs])
            axes.plot(x, losses.mean(axis=0), label=arm, linewidth=1.6, **looks[arm])
            axes.fill_between(
                x,
                losses.min(axis=0),
                losses.max(axis=0),
                color=looks[arm]["color"],
                alpha=0.18,
                lw=0,
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlabel(label)
        axes.set_ylabel("training loss, nats")
        axes.figure.legend(
            loc="outside lower center", ncols=LEGEND_COLUMNS
        )  # inside, many arms would hide a curve
    return file.getvalue()


def _column(result: Result, name: str) -> np.ndarray:
    return np.array([line[name] for line in result.metrics], float)


def _seconds(result: Result) -> np.ndarray:
    """Since the start of training, as the run logged it."""
    steps = _column(result, "step")
    return np.cumsum(np.diff(steps, prepend=0) * _column(result, "step_seconds"))


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of every value and of those before it, as far back as `SMOOTHED_SHARE` goes."""
    width = max(1, round(len(values) * SMOOTHED_SHARE))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
