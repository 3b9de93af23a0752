"""The files of a comparison: `comparison.md`, `comparison.json`, `comparison.svg` and `comparison.png`."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pipeline.apps.compare.analysis import Findings, Row, change_text, value_text
from pipeline.apps.compare.trials import COSTS
from pipeline.config.recipe import Recipe, recipe_values
from pipeline.core.files import atomic_write
from pipeline.metrics.catalogue import METRICS
from pipeline.metrics.intervals import Interval

_COLOURS = {"better": "#1a7f4b", "worse": "#b3402a", "not told apart": "#6b7280", "": "#374151"}
_HOW = (
    "Intervals are 95%: a bootstrap over held-out samples (the same ones drawn for all methods and seeds), widened by Student's "
    "t for the spread between seeds. Differences are paired, sample by sample and seed by seed; p-values are adjusted by Holm's "
    "method for as many comparisons as the table shows. Seconds to the first step are those of putting the method into the "
    "base, and of the spectra where KaSA needs them."
)


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
