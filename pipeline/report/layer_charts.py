"""Charts of the singular values that each adapted weight learned, beside those that it lost to truncation."""

from __future__ import annotations

import re
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pipeline.report.facts import LayerFacts
from pipeline.report.svg import COLOURS, inline_svg, new_figure

MAX_PANELS = 16
MAX_NAMED_ROWS = 40
MAX_LOST_ROWS = 10
# Half an axis unit apart at most: the two marks of one layer must not be taken for two layers.
OFFSET = 0.17


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
    _name_rows(axes, shown)
    return inline_svg(
        figure, "lost-shares", f"Share of output lost by {shown[0].name} and {len(shown) - 1} more layers"
    )


def relative(value: float, layer: LayerFacts) -> float:
    """A singular value as a share of the base weight's largest."""
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
    _share_ticks(axes, "y")
    said = f"{panel.title}: largest learned and largest dropped singular value in {len(panel.layers)} blocks"
    return inline_svg(figure, name, said)


def _within(values: list[float], layer: LayerFacts, limits: tuple[float, float]) -> list[float]:
    """Values as shares of the base weight's largest; those too small for the scale are put on its lower edge."""
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
    _name_rows(axes, shown)
    title = "Weights" if len(shown) == len(layers) else f"The {len(shown)} of {len(layers)} weights that learned most"
    return LayerFigure(title, inline_svg(figure, "layers", f"{title}: largest learned and dropped singular value"))


def _name_rows(axes: Axes, layers: list[LayerFacts]) -> None:
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers])
    axes.set_ylim(len(layers) - 0.4, -0.6)
    _share_ticks(axes, "x")
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=0.8)


def _limits(layers: list[LayerFacts]) -> tuple[float, float]:
    """Limits of one scale for all panels, a little beyond the largest values, which the dots show."""
    tops = [relative(max(values), layer) for layer in layers for values in (layer.learned, layer.dropped) if values]
    positive = [top for top in tops if top > 0] or [1e-3]
    return min(positive) / 4, max(positive) * 1.6


def _share_ticks(axes: Axes, which: str) -> None:
    axis = axes.yaxis if which == "y" else axes.xaxis
    axes.grid(axis="y" if which == "y" else "x", color=COLOURS["rule"], linewidth=0.8)
    axis.set_major_locator(LogLocator(numticks=5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.6g}%"))
