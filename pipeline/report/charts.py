"""Charts of metrics, training and stages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pipeline.metrics.catalogue import SHARES
from pipeline.metrics.intervals import Interval
from pipeline.report.formats import metric_value, significant, spoken
from pipeline.report.svg import COLOURS, inline_svg, new_figure

Records = list[dict[str, float]]
BUCKETS = 300
GLYPH_SIZE = (150, 20)
ROUND_STEPS = [1, 2, 2.5, 5, 10]


def gate_chart(metric: str, values: dict[str, float], difference: Interval | None) -> Markup:
    """Every candidate on the metric's own scale, with the interval around the adapted one."""
    figure, axes = new_figure(400, 36)
    interval = [values["base"] + edge for edge in (difference.low, difference.high)] if difference else []
    axes.axhline(0, color=COLOURS["rule"], linewidth=1)
    if interval:
        axes.plot(interval, [0, 0], color=COLOURS["adapted"], linewidth=5, alpha=0.25, solid_capstyle="butt")
    for name, value in values.items():
        axes.plot([value], [0], "o", color=COLOURS.get(name, COLOURS["extra"]), markersize=6)
    axes.set(xlim=_gate_limits(metric, [*values.values(), *interval]), ylim=(-1, 1), yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _scale_tick(metric, value)))
    said = ", ".join(f"{name} {metric_value(metric, value)}" for name, value in values.items())
    return inline_svg(figure, "gate", f"{spoken(metric)}: {said}")


def _gate_limits(metric: str, shown: list[float]) -> tuple[float, float]:
    """Axis limits: the whole scale where the candidates are far apart, else the part of it around them."""
    top = 1.0 if metric in SHARES else 1.08 * max(shown)
    span = max(shown) - min(shown)
    if span > top / 4:
        return -0.015 * top, 1.015 * top
    margin = span / 2 or 0.05 * abs(top) or 1.0
    return min(shown) - margin, max(shown) + margin


def interval_glyph(name: str, difference: Interval, verdict: str, lower_is_better: bool, said: str) -> Markup:
    """One interval on its own scale: zero in the middle, better to the right whatever the metric's direction. `said` is the
    difference as text, for screen readers."""
    figure, axes = new_figure(*GLYPH_SIZE)
    direction = -1 if lower_is_better else 1
    reach = 1.1 * max(abs(difference.low), abs(difference.high), abs(difference.estimate)) or 1.0
    colour = COLOURS.get(verdict, COLOURS["muted"])
    axes.axvline(0, color=COLOURS["muted"], linewidth=1)
    axes.plot([direction * difference.low, direction * difference.high], [0, 0], color=colour, linewidth=2)
    axes.plot([direction * difference.estimate], [0], "o", color=colour, markersize=6)
    axes.set(xlim=(-reach, reach), ylim=(-1, 1), xticks=[], yticks=[])
    return inline_svg(figure, f"interval-{name}", said)


def stage_bar(name: str, status: str, seconds: float, longest: float) -> Markup:
    """The time of one stage as a bar; all stages share the scale."""
    figure, axes = new_figure(*GLYPH_SIZE)
    colour = COLOURS["adapted" if status == "computed" else "base"]
    axes.barh([0], [seconds], color=colour, height=1.2)
    axes.axvline(0, color=COLOURS["rule"], linewidth=1, zorder=0)
    axes.set(xlim=(0, 1.02 * longest or 1.0), ylim=(-1, 1), xticks=[], yticks=[])
    return inline_svg(figure, f"stage-{name}", f"{name}: {seconds:.1f} s, {status}")


def loss_chart(records: Records) -> Markup:
    """Loss of every step, faint, under its moving mean; the validation losses as points."""
    figure, axes = new_figure(430, 210)
    _curve(axes, records, "loss", "adapted", faint=True)
    validations = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    if validations:
        axes.plot(*zip(*validations.items(), strict=True), "o", color=COLOURS["ink"], markersize=4, label="validation")
        axes.legend(frameon=False, loc="upper right")
    _step_axis(axes, records)
    first, last = significant(records[0]["loss"]), significant(records[-1]["loss"])
    return inline_svg(figure, "loss", f"Loss by step: from {first} to {last}")


def parts_chart(records: Records) -> Markup:
    """Task loss and the penalties on one logarithmic scale; a part that is zero throughout is not drawn."""
    figure, axes = new_figure(430, 210)
    axes.set_yscale("log")
    for key, role in PARTS.items():
        if key not in zero_parts(records):
            _curve(axes, records, key, role)
    _step_axis(axes, records)
    _sparse_log_ticks(axes)
    return inline_svg(figure, "parts", "Task loss, singular value penalty and orthogonality penalty by step, log scale")


def series_chart(records: Records, key: str) -> Markup:
    """One quantity of the training by step."""
    figure, axes = new_figure(285, 160)
    _curve(axes, records, key, "ink", faint=key != "learning_rate")
    axes.set_ylim(bottom=0)
    _step_axis(axes, records)
    values = [record[key] for record in records]
    said = f"{spoken(key)} by step: from {significant(values[0])} to {significant(values[-1])}"
    return inline_svg(figure, key, said)


PARTS = {"task_loss": "adapted", "singular_value_penalty": "champion", "orthogonality_penalty": "extra"}


def zero_parts(records: Records) -> list[str]:
    """The parts of the loss that a logarithmic scale cannot show."""
    return [key for key in PARTS if max(record[key] for record in records) <= 0]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over about a twentieth of the run; the window shrinks at both ends instead of padding."""
    count = len(values)
    half = count // 40 + (count > 4)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    position = np.arange(count)
    low, high = np.maximum(position - half, 0), np.minimum(position + half + 1, count)
    return (sums[high] - sums[low]) / (high - low)


def thinned(values: np.ndarray, buckets: int = BUCKETS) -> np.ndarray:
    """Positions to draw: the lowest and the highest of each bucket, and both ends, so that no spike is lost."""
    if len(values) <= 2 * buckets:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), buckets + 1).astype(int)
    extremes = [low + at(values[low:high]) for low, high in pairwise(edges) for at in (np.argmin, np.argmax)]
    return np.unique([0, *extremes, len(values) - 1])


def _curve(axes: Axes, records: Records, key: str, role: str, faint: bool = False) -> None:
    steps = np.array([record["step"] for record in records])
    values = np.array([record[key] for record in records], dtype=float)
    style: dict[str, Any] = {"color": COLOURS[role], "solid_joinstyle": "round"}
    if len(values) == 1:
        axes.plot(steps, values, "o", markersize=6, **style)
        return
    if faint:
        _draw(axes, steps, values, linewidth=0.9, alpha=0.35, **style)
        values = smoothed(values)
    _draw(axes, steps, values, linewidth=1.6, **style)


def _draw(axes: Axes, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    kept = thinned(values)
    axes.plot(steps[kept], values[kept], **style)


def _step_axis(axes: Axes, records: Records) -> None:
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=ROUND_STEPS, integer=True))
    if len(records) == 1:
        axes.set_xticks([records[0]["step"]])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=ROUND_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(plain_tick))
    axes.margins(x=0.02)


def _sparse_log_ticks(axes: Axes) -> None:
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())


def plain_tick(value: float, _: Any = None) -> str:
    """An axis number without mathematics markup, which would fall back to drawn paths."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e\u2212{abs(int(exponent))}"
    return f"{value:,.10g}".replace("-", "\u2212")


def _scale_tick(metric: str, value: float) -> str:
    return f"{100 * value:.10g}%" if metric in SHARES else plain_tick(value)


def candidates_in_order(names: Sequence[str]) -> list[str]:
    """Names in the order base, adapted, champion, then all others."""
    known = [name for name in ("base", "adapted", "champion") if name in names]
    return known + [name for name in names if name not in known]
