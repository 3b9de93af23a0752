"""The charts of the page: metrics, training, stages, and what each adapted weight learned beside what it lost to truncation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pipeline.metrics.catalogue import SHARES
from pipeline.metrics.intervals import Interval
from pipeline.report.facts import COLOURS, LayerFacts, inline_svg, metric_value, new_figure, significant, spoken

Records = list[dict[str, float]]
BUCKETS = 300
GLYPH_SIZE = (150, 20)
ROUND_STEPS = [1, 2, 2.5, 5, 10]

PARTS = {"task_loss": "adapted", "singular_value_penalty": "champion", "orthogonality_penalty": "extra"}
MAX_PANELS = 16
MAX_NAMED_ROWS = 40
MAX_LOST_ROWS = 10
# Half an axis unit apart at most: the two marks of one layer must not be taken for two layers.
OFFSET = 0.17


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


@dataclass(frozen=True)
class LayerPanel:
    """One module type in all the blocks that have it: block index -> weight."""

    title: str
    layers: dict[int, LayerFacts]


@dataclass(frozen=True)
class LayerFigure:
    """A chart with its caption."""

    title: str
    svg: Markup


def layer_panels(layers: list[LayerFacts]) -> list[LayerPanel]:
    """Weights by module type, from names such as `model.layers.12.self_attn.q_proj`.

    Empty where a name has no block number or the types are too many for panels (experts).
    """
    grouped: dict[tuple[str, str], dict[int, LayerFacts]] = {}
    for layer in layers:
        match = re.fullmatch(r"(.*?)\.?(\d+)\.(.+)", layer.name)
        if match is None:
            return []
        prefix, index, module = match.groups()
        grouped.setdefault((prefix, module), {})[int(index)] = layer
    if len(grouped) > MAX_PANELS:
        return []
    several = len({prefix for prefix, _ in grouped}) > 1
    return [
        LayerPanel(f"{prefix}.{module}" if several else module, members)
        for (prefix, module), members in grouped.items()
    ]


def layer_figures(layers: list[LayerFacts]) -> list[LayerFigure]:
    """One panel for each module type, or one list of names."""
    if not layers:
        return []
    limits = _limits(layers)
    panels = layer_panels(layers)
    if not panels:
        return [_named_rows(layers, limits)]
    return [LayerFigure(panel.title, _panel_chart(panel, limits, f"layers-{i}")) for i, panel in enumerate(panels)]


def lost_shares(layers: list[LayerFacts]) -> Markup | None:
    """A dot for each layer that loses the largest share of its output to truncation; None where no layer loses any."""
    shown = sorted((layer for layer in layers if layer.output_share > 0), key=lambda layer: -layer.output_share)
    shown = shown[:MAX_LOST_ROWS]
    if not shown:
        return None
    figure, axes = new_figure(720, 40 + 18 * len(shown))
    shares = [layer.output_share for layer in shown]
    axes.plot(shares, range(len(shown)), "o", color=COLOURS["base"], markersize=6, markeredgewidth=0)
    axes.set_xscale("log")
    axes.set_xlim(min(shares) / 2, max(shares) * 2)
    _name_rows(axes, shown, are_shares=True)
    return inline_svg(
        figure, "lost-shares", f"Share of output lost by {shown[0].name} and {len(shown) - 1} more layers"
    )


def relative(value: float, layer: LayerFacts) -> float:
    """A singular value as a share of the base weight's largest; as it is where that is not known."""
    if layer.largest is None:
        return value
    return value / layer.largest if layer.largest > 0 else 0.0


def _panel_chart(panel: LayerPanel, limits: tuple[float, float], name: str) -> Markup:
    figure, axes = new_figure(430, 150)
    for index, layer in panel.layers.items():
        _spread(axes, index - OFFSET, _within(layer.dropped, layer, limits), "base")
        _spread(axes, index + OFFSET, _within(layer.learned, layer, limits), "adapted")
    axes.set_xlim(min(panel.layers) - 0.7, max(panel.layers) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set_yscale("log")
    axes.set_ylim(limits)
    are_shares = all(layer.largest is not None for layer in panel.layers.values())
    _ticks(axes, "y", are_shares)
    what = "learned and largest dropped" if are_shares else "learned"
    said = f"{panel.title}: largest {what} singular value in {len(panel.layers)} blocks"
    return inline_svg(figure, name, said)


def _within(values: list[float], layer: LayerFacts, limits: tuple[float, float]) -> list[float]:
    """Values as `relative` gives them; those too small for the scale are put on its lower edge."""
    return [max(relative(value, layer), limits[0]) for value in values]


def _spread(axes: Axes, at: float, shares: list[float], role: str) -> None:
    """Draw a dot at the largest value, and a hairline down to the smallest."""
    if not shares:
        return
    axes.plot([at, at], [min(shares), max(shares)], color=COLOURS[role], linewidth=1.2, alpha=0.45)
    axes.plot([at], [max(shares)], "o", color=COLOURS[role], markersize=4, markeredgewidth=0)


def _named_rows(layers: list[LayerFacts], limits: tuple[float, float]) -> LayerFigure:
    shown = sorted(layers, key=lambda layer: -max((relative(v, layer) for v in layer.learned), default=0.0))
    shown = shown[:MAX_NAMED_ROWS]
    figure, axes = new_figure(720, 40 + 18 * len(shown))
    for row, layer in enumerate(shown):
        for values, role in ((layer.dropped, "base"), (layer.learned, "adapted")):
            if values:
                axes.plot(
                    [max(_within(values, layer, limits))],
                    [row],
                    "o",
                    color=COLOURS[role],
                    markersize=6,
                    markeredgewidth=0,
                )
    axes.set_xscale("log")
    axes.set_xlim(limits)
    are_shares = all(layer.largest is not None for layer in shown)
    _name_rows(axes, shown, are_shares)
    title = "Weights" if len(shown) == len(layers) else f"The {len(shown)} of {len(layers)} weights that learned most"
    said = f"{title}: largest {'learned and dropped' if are_shares else 'learned'} singular value"
    return LayerFigure(title, inline_svg(figure, "layers", said))


def _name_rows(axes: Axes, layers: list[LayerFacts], are_shares: bool) -> None:
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers])
    axes.set_ylim(len(layers) - 0.4, -0.6)
    _ticks(axes, "x", are_shares)
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=0.8)


def _limits(layers: list[LayerFacts]) -> tuple[float, float]:
    """Limits of one scale for all panels, a little beyond the largest values, which the dots show."""
    tops = [relative(max(values), layer) for layer in layers for values in (layer.learned, layer.dropped) if values]
    positive = [top for top in tops if top > 0] or [1e-3]
    return min(positive) / 4, max(positive) * 1.6


def _ticks(axes: Axes, which: str, are_shares: bool) -> None:
    axis = axes.yaxis if which == "y" else axes.xaxis
    axes.grid(axis="y" if which == "y" else "x", color=COLOURS["rule"], linewidth=0.8)
    axis.set_major_locator(LogLocator(numticks=5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g}%" if are_shares else f"{value:.6g}"))
