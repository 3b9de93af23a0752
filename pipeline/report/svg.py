"""Matplotlib figures as inline SVG that takes its colours and its font from the page.

Figures are drawn in stand-in colours, one for each role; the SVG names a CSS variable instead, so that one drawing
serves light, dark and print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Any distinct colours do that no drawing would use by chance.
COLOURS = {
    "ink": "#010203",
    "muted": "#010204",
    "rule": "#010205",
    "base": "#010206",
    "adapted": "#010207",
    "champion": "#010208",
    "better": "#010209",
    "worse": "#01020a",
    "extra": "#01020b",
    "paper": "#01020c",
}
FONT_SIZE = 11
MAX_ENLARGEMENT = 1.3


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of CSS pixels (at natural size) with one bare, transparent axes."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=FONT_SIZE, labelcolor=COLOURS["muted"])
    return figure, axes


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an `<svg>` element.

    Args:
        name: unique on the page: it salts the element ids, which are global in HTML.
        label: what a screen reader says.
    """
    buffer = io.StringIO()
    with _svg_settings(name):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    drawn = buffer.getvalue()
    width = figure.get_figwidth() * 72
    body = _tidy(drawn[drawn.index("<defs>") : drawn.rindex("</svg>")])
    return Markup(
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {figure.get_figheight() * 72:g}" '
        f'style="max-width:{width * MAX_ENLARGEMENT:g}px">{body}</svg>'
    )


@contextmanager
def _svg_settings(name: str) -> Iterator[None]:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": True}):
        yield


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}"


def _tidy(body: str) -> str:
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[\w.]+_\d+"', "<g", body)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r"font: (?:[a-z0-9]+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", body)
    # Inside tags only: between them stand the tick labels.
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"-?\d+\.\d{3,}", _rounded, tag[0]), body)
    for role, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{role})")
    return re.sub(r"\s*\n\s*", " ", body)
