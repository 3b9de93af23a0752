"""What a person reads of a version in MLflow: its description, Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.metrics.catalogue import METRICS
from pipeline.metrics.intervals import Interval
from pipeline.registry.promotion import Decision

_SHORT = 12


def model_card(
    decision: Decision,
    metrics: Mapping[str, Mapping[str, float]],
    differences: Mapping[str, Mapping[str, Interval]],
    lineage: Mapping[str, str],
    rows: int,
) -> str:
    """The verdict, the comparison on the held-out samples, and where the version comes from.

    Args:
        metrics: candidate (`base`, `adapted`, `champion`) -> metric -> value.
        differences: opponent -> metric -> adapted - opponent.
        lineage: caption -> digest, key or name; long digests are shortened.
        rows: how many held-out samples there were.
    """
    verdict = "Promoted" if decision.promote else "Kept out"
    names = [name for name in METRICS if name in metrics["adapted"]]
    head = [f"{rows} held-out samples", *metrics, *(f"adapted - {opponent}, 95%" for opponent in differences)]
    table = [head, ["---"] * len(head)]
    for name in names:
        values = [f"{metrics[candidate][name]:.4f}" for candidate in metrics]
        table.append([name, *values, *(_interval(differences[opponent].get(name)) for opponent in differences)])
    lines = [f"| {' | '.join(row)} |" for row in table]
    sources = [f"- {caption}: `{_shortened(value)}`" for caption, value in lineage.items()]
    return "\n".join([f"**{verdict}**: {decision.reason}", "", *lines, "", *sources, "", "History", ""])


def _interval(difference: Interval | None) -> str:
    return "" if difference is None else f"{difference.estimate:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _shortened(value: str) -> str:
    digest, dash, remark = value.partition("-")
    is_digest = len(digest) > 2 * _SHORT and set(digest) <= set("0123456789abcdef")
    return f"{digest[:_SHORT]}{dash}{remark}" if is_digest else value
