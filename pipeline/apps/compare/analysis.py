"""Analysis of a comparison: means, paired tests, and a conclusion that says no more than the data support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from pipeline.apps.compare.methods import ChosenRate
from pipeline.core.journal import Record
from pipeline.metrics.catalogue import LOWER_IS_BETTER, METRICS, SHARES
from pipeline.metrics.intervals import Difference, Interval, difference_over_seeds, holm, mean_over_seeds

LEVEL = 0.05


@dataclass(frozen=True)
class MethodResult:
    """The results of all trials of one method.

    Attributes:
        name: the method's name, or `base`.
        runs: per-sample results, one list for each seed; the base has one list.
        costs: means over the seeds, by the names of `pipeline.apps.compare.trials.COSTS`; empty for the base.
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
    return Findings(metric, against, seeds, samples, rows, conclusion, _limits(rows, metric, against, seeds))


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


def _limits(rows: Sequence[Row], metric: str, against: str, seeds: int) -> tuple[str, ...]:
    compared = [row for row in rows if row.difference is not None]
    said = []
    if unknown := [row for row in compared if row.verdict == "not told apart"]:
        widths = [(row.difference.interval.high - row.difference.interval.low) / 2 for row in unknown if row.difference]
        widest = change_text(metric, max(widths)).lstrip("+")
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
