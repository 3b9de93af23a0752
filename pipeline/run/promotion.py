"""Whether a new version becomes the champion, decided from measured numbers alone, and the model card that says so.

The card is the version's description in MLflow, in Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.metrics.catalogue import LOWER_IS_BETTER, METRICS
from pipeline.metrics.intervals import LEAST_SAMPLES, Interval

# Digits that are shown of a digest.
_SHORT = 12


@dataclass(frozen=True)
class Gate:
    """What a new version has to show.

    Attributes:
        metric: the metric that counts.
        margin: the gain in it that the whole 95% interval must lie above, in the metric's own unit.
        guards: other metrics -> the largest fall that is allowed; the whole interval must lie above it.
    """

    metric: str
    margin: float = 0.0
    guards: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """The verdict and its reason in words."""

    promote: bool
    reason: str


class _Finding(NamedTuple):
    holds: bool
    text: str


def decide(gate: Gate, against: Mapping[str, Mapping[str, Interval]], obstacle: str | None = None) -> Decision:
    """Promote only what is better than every opponent by more than the margin, and falls behind none in a guard metric.

    Uncertainty counts against the new version on both sides: it is the worse end of each interval that is judged.

    Args:
        gate: the bar.
        against: opponent (`base`, `champion`) -> metric -> paired difference new version - opponent, with its interval.
        obstacle: why a comparison that would be needed cannot be made, if so.
    """
    if obstacle:
        return Decision(False, obstacle)
    findings = []
    for opponent, differences in against.items():
        findings.append(_gain(gate, opponent, differences[gate.metric]))
        findings += [_guarded(guard, fall, opponent, differences[guard]) for guard, fall in gate.guards.items()]
    lost = [finding.text for finding in findings if not finding.holds]
    return Decision(not lost, "; ".join(lost or [finding.text for finding in findings]))


def too_few(samples: int) -> str | None:
    """Why so many held-out samples give no verdict; None where they may."""
    if samples >= LEAST_SAMPLES:
        return None
    return (
        f"no verdict on {samples} held-out sample{'s' if samples > 1 else ''}: chance alone may make so few agree; at least "
        f"{LEAST_SAMPLES} are needed, and some hundred to see small gains (data.heldout_rows, data.heldout_share)"
    )


def _gain(gate: Gate, opponent: str, difference: Interval) -> _Finding:
    low, high = _gain_interval(gate.metric, difference)
    numbers = _numbers(gate.metric, opponent, difference)
    if low > gate.margin:
        over = f", by more than {gate.margin:g}" if gate.margin else ""
        return _Finding(True, f"better{over}: {numbers}")
    if high < 0:
        return _Finding(False, f"worse: {numbers}")
    if not gate.margin:
        return _Finding(False, f"no clear gain: {numbers}; the 95% interval holds 0")
    if low > 0:
        return _Finding(False, f"too small a gain: {numbers}; the whole interval must show more than {gate.margin:g}")
    return _Finding(False, f"no clear gain: {numbers}; the whole interval must show more than {gate.margin:g}")


def _guarded(guard: str, largest_fall: float, opponent: str, difference: Interval) -> _Finding:
    low, high = _gain_interval(guard, difference)
    numbers = _numbers(guard, opponent, difference)
    if low >= -largest_fall:
        return _Finding(True, f"guard kept: {numbers}")
    allowed = (
        f"the whole interval must show {'a rise' if guard in LOWER_IS_BETTER else 'a fall'} of {largest_fall:g} at most"
    )
    verdict = "guard broken" if high < -largest_fall else "guard not certain"
    return _Finding(False, f"{verdict}: {numbers}; {allowed}")


def _gain_interval(metric: str, difference: Interval) -> tuple[float, float]:
    """Both ends, worse end first, with better as larger."""
    return (-difference.high, -difference.low) if metric in LOWER_IS_BETTER else (difference.low, difference.high)


def _numbers(metric: str, opponent: str, difference: Interval) -> str:
    return f"{metric} {difference.text()} against the {opponent}"


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
    return "" if difference is None else difference.text()


def _shortened(value: str) -> str:
    digest, dash, remark = value.partition("-")
    is_digest = len(digest) > 2 * _SHORT and set(digest) <= set("0123456789abcdef")
    return f"{digest[:_SHORT]}{dash}{remark}" if is_digest else value
