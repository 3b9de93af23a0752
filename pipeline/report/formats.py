"""Formats of numbers and names on the page."""

from __future__ import annotations

import math
from typing import Any

from pipeline.metrics.catalogue import METRICS, SHARES

ACRONYMS = frozenset({"cpu", "cpus", "gpu", "gpus", "id", "os", "sha256", "uri", "url"})
MINUS = "\u2212"


def spoken(name: str) -> str:
    """`exact_match` -> `Exact match`; metrics with a spelling of their own keep it."""
    if name in METRICS:
        return METRICS[name].label
    words = [word.upper() if word in ACRONYMS else word for word in name.split("_")]
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def significant(value: float) -> str:
    """At most four significant digits and four decimals; scientific below 0.001."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        text = f"{value:.2e}".replace("e-0", "e-")
    elif size >= 1000:
        text = f"{value:,.0f}"
    else:
        decimals = 4 if size < 1 else 3 - math.floor(math.log10(size))
        text = f"{value:.{decimals}f}"
    return text.replace("-", MINUS)


def metric_value(metric: str, value: float) -> str:
    """Shares as percentages, everything else with four digits."""
    return f"{100 * value:.1f}%" if metric in SHARES and math.isfinite(value) else significant(value)


def metric_change(metric: str, value: float) -> str:
    """A signed difference, without its unit."""
    sign = "+" if value > 0 else ""
    return sign + (f"{100 * value:.1f}".replace("-", MINUS) if metric in SHARES else significant(value))


def change_unit(metric: str) -> str:
    """The unit of a difference: percentage points for shares, none for other metrics."""
    return " points" if metric in SHARES else ""


def duration(seconds: float) -> str:
    """Seconds as `0.4 s`, `4 min 12 s` or `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def scalar(value: Any) -> str:
    """A scalar value, such as a setting."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return str(value)
