"""Analysis of a comparison: means, paired tests, a conclusion that says no more than the data support, and its files.

The files are `comparison.md`, `comparison.json`, `comparison.svg` and `comparison.png`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pipeline.apps.compared_methods import COSTS, ChosenRate
from pipeline.config.recipe import Recipe, recipe_values
from pipeline.core.files import Record, atomic_write
from pipeline.metrics.catalogue import LOWER_IS_BETTER, METRICS, SHARES
from pipeline.metrics.intervals import LEAST_SAMPLES, Difference, Interval, difference_over_seeds, holm, mean_over_seeds

LEVEL = 0.05

_COLOURS = {"better": "#1a7f4b", "worse": "#b3402a", "not told apart": "#6b7280", "": "#374151"}
_HOW = (
    "Intervals are 95%: a bootstrap over held-out samples (the same ones drawn for all methods and seeds), widened by Student's "
    "t for the spread between seeds. Differences are paired, sample by sample and seed by seed; p-values are adjusted by Holm's "
    "method for as many comparisons as the table shows. Seconds to the first step are those of putting the method into the "
    "base, and of the spectra where KaSA needs them."
)


@dataclass(frozen=True)
class MethodResult:
    """The results of all trials of one method.

    Attributes:
        name: the method's name, or `base`.
        runs: per-sample results, one list for each seed; the base has one list.
        costs: means over the seeds, by the names of `pipeline.apps.compare.COSTS`; empty for the base.
        rank: rank of the adapter; None for methods without one.
        learning_rate: of the trainings.
        chosen: the result of tuning, if there was any.
        failure: why a training failed; `runs` is empty then.
    """

    name: str
    runs: Sequence[Sequence[Record]]
    costs: Mapping[str, float] = field(default_factory=dict)
    rank: int | None = None
    learning_rate: float | None = None
    chosen: ChosenRate | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Row:
    """One method in the table.

    Attributes:
        result: the method's results.
        metrics: metric -> mean over seeds with its interval.
        difference: from the reference; None for the reference itself, and where a training failed.
        adjusted_p: p-value of the difference after Holm's correction.
        verdict: `better`, `worse` or `not told apart`; empty where there is no difference.
    """

    result: MethodResult
    metrics: dict[str, Interval]
    difference: Difference | None = None
    adjusted_p: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Findings:
    """The result of a comparison.

    Attributes:
        metric: the metric that the methods are compared by.
        against: the reference that all others are compared with.
        seeds: number of seeds.
        samples: number of held-out samples.
        rows: the base first, then the methods as they were asked for.
        conclusion: what the data support.
        limits: what they do not support, one sentence each.
    """

    metric: str
    against: str
    seeds: int
    samples: int
    rows: tuple[Row, ...]
    conclusion: str
    limits: tuple[str, ...]


def findings(
    results: Sequence[MethodResult], metric: str, measured: Sequence[str], against: str, seeds: int
) -> Findings:
    """Analyse the results of a comparison: means, paired differences with Holm's correction, and the conclusion.

    Args:
        results: the results of all methods and the base; one of them is named `against`.
        metric: the metric to compare by.
        measured: all metrics to show.
        against: the reference.
        seeds: number of seeds.
    """
    reference = next(one for one in results if one.name == against)
    differences = {
        one.name: difference_over_seeds(one.runs, reference.runs, metric)
        for one in results
        if one.name != against and one.runs and reference.runs
    }
    adjusted = holm({name: difference.p_value for name, difference in differences.items()})
    rows = tuple(_row(one, measured, metric, differences.get(one.name), adjusted.get(one.name)) for one in results)
    samples = max(len(one.runs[0]) for one in results if one.runs)
    conclusion = _conclusion(rows, metric, against, seeds, samples)
    return Findings(metric, against, seeds, samples, rows, conclusion, _limits(rows, metric, against, seeds, samples))


def _row(
    result: MethodResult, measured: Sequence[str], metric: str, difference: Difference | None, adjusted: float | None
) -> Row:
    metrics = {name: mean_over_seeds(result.runs, name) for name in measured} if result.runs else {}
    if difference is None or adjusted is None:
        return Row(result, metrics)
    return Row(result, metrics, difference, adjusted, verdict(difference.interval, adjusted, metric in LOWER_IS_BETTER))


def verdict(difference: Interval, adjusted_p: float, lower_is_better: bool) -> str:
    """`better` or `worse` if the interval excludes zero and Holm's test is significant too, else `not told apart`."""
    if adjusted_p >= LEVEL or difference.low <= 0 <= difference.high:
        return "not told apart"
    return "better" if (difference.estimate < 0) == lower_is_better else "worse"


def _conclusion(rows: Sequence[Row], metric: str, against: str, seeds: int, samples: int) -> str:
    label = METRICS[metric].label
    groups = {kind: [row for row in rows if row.verdict == kind] for kind in ("better", "worse", "not told apart")}
    where = f"By {label} over {samples} held-out samples and {seeds} seed{'s' if seeds > 1 else ''}"
    if not any(groups.values()):
        return f"{where} there is nothing to hold against {against}."
    parts = [
        f"{kind} than {against}: {', '.join(_with_difference(row, metric) for row in groups[kind])}"
        for kind in ("better", "worse")
        if groups[kind]
    ]
    if unknown := groups["not told apart"]:
        parts.append(f"not told apart from {against}: {', '.join(_with_difference(row, metric) for row in unknown)}")
    return f"{where}, {'; '.join(parts)}."


def _with_difference(row: Row, metric: str) -> str:
    assert row.difference is not None
    return f"{row.result.name} ({row.difference.interval.text(partial(change_text, metric))})"


def change_text(metric: str, value: float) -> str:
    """A difference with its sign; shares are written in percentage points."""
    return (
        f"{100 * value:+.2f}" if metric in SHARES else f"{value:+.3g}" if metric in LOWER_IS_BETTER else f"{value:+.2f}"
    )


def value_text(metric: str, value: float) -> str:
    """A value; shares are written in percent."""
    return f"{100 * value:.2f}" if metric in SHARES else f"{value:.4g}" if metric in LOWER_IS_BETTER else f"{value:.2f}"


def _limits(rows: Sequence[Row], metric: str, against: str, seeds: int, samples: int) -> tuple[str, ...]:
    compared = [row for row in rows if row.difference is not None]
    said = []
    unknown = [row.difference.interval for row in compared if row.difference and row.verdict == "not told apart"]
    half_width = max(((interval.high - interval.low) / 2 for interval in unknown), default=0.0)
    if samples < LEAST_SAMPLES:
        said.append(
            f"{samples} held-out samples tell no methods apart, however they differ: chance alone may make so few agree. At "
            f"least {LEAST_SAMPLES} are needed, and some hundred to see small differences."
        )
    elif unknown and not half_width:
        said.append(
            f"Not one of the {samples} held-out samples differs, which says nothing of samples that would; use more of them."
        )
    elif unknown:
        widest = change_text(metric, half_width).lstrip("+")
        said.append(
            f"Where methods are not told apart, that is no proof that they are equal: differences from {against} of up to "
            f"about {widest} in either direction could have gone unseen."
        )
    if seeds == 1:
        said.append(
            "With one seed nothing is known of the spread between trainings: the intervals cover the choice of samples alone, "
            "and another seed may turn the order round. Use --seeds 3 or more."
        )
    elif seeds < 5:
        said.append(f"{seeds} seeds show the spread between trainings only roughly; the intervals allow for that.")
    if edges := [row.result.name for row in rows if row.result.chosen and row.result.chosen.at_edge]:
        said.append(
            f"The chosen learning rate of {', '.join(edges)} lies at the edge of those tried; a better one may lie beyond."
        )
    if not any(row.result.chosen for row in rows):
        said.append(
            "All methods were trained at one learning rate, which suits some better than others; --tune lr gives each its own."
        )
    said += [f"{row.result.name} has no result: {row.result.failure}" for row in rows if row.result.failure]
    said.append("What holds on these data, this base and this budget need not hold on others.")
    return tuple(said)


def write_comparison(folder: Path, name: str, recipe: Recipe, found: Findings) -> None:
    """Write the files of a comparison into a folder; each appears complete or not at all."""
    atomic_write(folder / "comparison.md", markdown(name, recipe, found))
    values = {"name": name, "recipe": recipe_values(recipe), **findings_json(found)}
    atomic_write(folder / "comparison.json", json.dumps(values, indent=1))
    figure = _figure(found)
    for kind, canvas in (("svg", FigureCanvasSVG), ("png", FigureCanvasAgg)):
        drawn = io.BytesIO()
        getattr(canvas(figure), f"print_{kind}")(drawn)
        atomic_write(folder / f"comparison.{kind}", drawn.getvalue())


def findings_json(found: Findings) -> dict[str, Any]:
    """The findings as JSON values, without the results of single samples."""
    return {
        "metric": found.metric,
        "against": found.against,
        "seeds": found.seeds,
        "samples": found.samples,
        "conclusion": found.conclusion,
        "limits": list(found.limits),
        "methods": {row.result.name: _row_json(row) for row in found.rows},
    }


def _row_json(row: Row) -> dict[str, Any]:
    result, difference = row.result, row.difference
    return {
        "rank": result.rank,
        "learning_rate": result.learning_rate,
        "tuning": dataclasses.asdict(result.chosen) if result.chosen else None,
        "failure": result.failure,
        "metrics": {metric: dataclasses.asdict(interval) for metric, interval in row.metrics.items()},
        "difference": None
        if difference is None
        else {
            **dataclasses.asdict(difference.interval),
            "by_seed": list(difference.by_seed),
            "p": difference.p_value,
            "p_holm": row.adjusted_p,
            "verdict": row.verdict,
        },
        "costs": {name: None if math.isnan(value) else value for name, value in result.costs.items()},
    }


def markdown(name: str, recipe: Recipe, found: Findings) -> str:
    """The page in Markdown: conclusion, table, limits, other metrics, learning rates, and how all was computed."""
    others = [metric for metric in next(row.metrics for row in found.rows if row.metrics) if metric != found.metric]
    parts = [
        f"# Comparison {name}",
        found.conclusion,
        "![Every method with its interval](comparison.svg)",
        _table(*table(found)),
        "\n".join(f"- {limit}" for limit in found.limits),
    ]
    if others:
        rows = [
            [row.result.name, *(_interval(metric, row.metrics.get(metric), value_text) for metric in others)]
            for row in found.rows
        ]
        parts += ["## Other metrics", _table(["method", *(METRICS[metric].label for metric in others)], rows)]
    if tuned := [row for row in found.rows if row.result.chosen]:
        rows = [
            [row.result.name, f"{row.result.chosen.rate:g}", _losses(row.result.chosen.losses)]
            for row in tuned
            if row.result.chosen
        ]
        parts += ["## Learning rates", _table(["method", "chosen", "validation loss at each rate tried"], rows)]
    base, train = recipe.base.model, recipe.train
    parts += [
        "## How",
        _HOW,
        f"Base {base}; every method: the same data in the same order for each seed, batches of {train.batch_size}, "
        f"{train.precision}, and the rank at which it trains as nearly as it can what KaSA trains at rank "
        f"{recipe.adapter.rank}.",
    ]
    return "\n\n".join(parts) + "\n"


def table(found: Findings) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the main table."""
    metric = found.metric
    arrow = "lower is better" if METRICS[metric].lower_is_better else "higher is better"
    head = ["method", "rank", "rate", f"{METRICS[metric].label} ({arrow})", f"against {found.against}", "p (Holm)", ""]
    rows = []
    for row in found.rows:
        result, difference = row.result, row.difference
        rows.append(
            [
                result.name,
                "" if result.rank is None else str(result.rank),
                "" if result.learning_rate is None else f"{result.learning_rate:g}",
                _interval(metric, row.metrics.get(metric), value_text) if not result.failure else "no result",
                _interval(metric, difference.interval if difference else None, change_text),
                "" if row.adjusted_p is None else f"{row.adjusted_p:.3f}",
                row.verdict,
                *(cost_text(name, result.costs.get(name)) for name in COSTS),
            ]
        )
    return [*head, *COSTS.values()], rows


def cost_text(name: str, value: float | None) -> str:
    """A cost as text; empty where it is unknown."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:,.0f}" if name in ("trainable_parameters", "tokens_per_second") else f"{value:.2f}"


def _interval(metric: str, interval: Interval | None, text: Callable[[str, float], str]) -> str:
    return "" if interval is None else interval.text(partial(text, metric))


def _losses(losses: Mapping[float, float]) -> str:
    return ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(losses.items()))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(found: Findings) -> Figure:
    rows = [row for row in found.rows if row.metrics]
    figure = Figure(figsize=(10, 1.3 + 0.32 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    label = METRICS[found.metric].label
    _dots(left, rows, [row.metrics[found.metric] for row in rows], f"{label}, mean over {found.seeds} seeds")
    _dots(
        right,
        rows,
        [row.difference.interval if row.difference else None for row in rows],
        f"difference from {found.against}",
    )
    right.axvline(0, color="#9ca3af", linewidth=1, zorder=0)
    left.set_yticks(range(len(rows)), [row.result.name for row in rows])
    left.invert_yaxis()
    return figure


def _dots(axes: Axes, rows: Sequence[Row], intervals: Sequence[Interval | None], title: str) -> None:
    for place, (row, interval) in enumerate(zip(rows, intervals, strict=True)):
        if interval is not None:
            colour = _COLOURS[row.verdict]
            axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2)
            axes.plot([interval.estimate], [place], "o", color=colour, markersize=6)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
