"""Whether a new version becomes the champion: a pure decision over measured numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.evaluation.metrics import LOWER_IS_BETTER
from pipeline.report.facts import Difference


@dataclass(frozen=True)
class Decision:
    """The verdict and its reason in words."""

    promote: bool
    reason: str


def decide(metric: str, against: Mapping[str, Difference], obstacle: str | None = None) -> Decision:
    """Promote only what is better than every opponent by more than chance.

    Args:
        metric: the metric that counts.
        against: opponent (`base`, `champion`) -> paired difference challenger - opponent, with its 95% interval.
        obstacle: why a comparison that would be needed cannot be made, if so.
    """
    if obstacle:
        return Decision(False, obstacle)
    findings = [_finding(metric, opponent, difference) for opponent, difference in against.items()]
    lost = [text for better, text in findings if not better]
    return Decision(not lost, "; ".join(lost or [text for _, text in findings]))


def _finding(metric: str, opponent: str, difference: Difference) -> tuple[bool, str]:
    sign = -1 if metric in LOWER_IS_BETTER else 1
    low, high = sorted((sign * difference.low, sign * difference.high))
    numbers = (
        f"{metric} {difference.estimate:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}] against the {opponent}"
    )
    if low > 0:
        return True, f"better: {numbers}"
    if high < 0:
        return False, f"worse: {numbers}"
    return False, f"no clear gain: {numbers}; the 95% interval holds 0"
