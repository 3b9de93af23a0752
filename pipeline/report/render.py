"""Rendering of the report: one HTML file that needs no network, no server and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.core.files import atomic_write
from pipeline.evaluation.results import HarnessRow
from pipeline.metrics.catalogue import LOWER_IS_BETTER
from pipeline.metrics.intervals import Interval
from pipeline.report import charts
from pipeline.report import facts as formats
from pipeline.report.charts import (
    candidates_in_order,
    gate_chart,
    interval_glyph,
    layer_figures,
    layer_panels,
    lost_shares,
    relative,
)
from pipeline.report.facts import ReportFacts, SampleFacts, change_unit, metric_change, metric_value, spoken

Outcome = Literal["better", "worse", "unclear"]


@dataclass(frozen=True)
class Change:
    """A paired difference as text, with its chart."""

    estimate: str
    low: str
    high: str
    unit: str
    outcome: Outcome
    glyph: Markup


@dataclass(frozen=True)
class MetricRow:
    """One metric of every candidate; a candidate without it has no entry in `values`, nor in `intervals`."""

    label: str
    lower_is_better: bool
    decides: bool
    values: dict[str, str]
    intervals: dict[str, str]
    best: str | None
    change: Change | None


@dataclass(frozen=True)
class Comparison:
    """The candidates side by side: all metrics, the deciding one first, and its chart."""

    candidates: list[str]
    rows: list[MetricRow]
    harness: list[MetricRow]
    gate: MetricRow | None
    chart: Markup | None


def outcome(difference: Interval, lower_is_better: bool) -> Outcome:
    """`better` or `worse` only if the whole interval is on one side of zero, else `unclear`."""
    low, high = difference.low, difference.high
    if lower_is_better:
        low, high = -high, -low
    if low > 0:
        return "better"
    return "worse" if high < 0 else "unclear"


def compare(facts: ReportFacts) -> Comparison:
    """Compare the candidates as the page shows them."""
    candidates = candidates_in_order(list(facts.metrics))
    measured = list(dict.fromkeys(metric for candidate in candidates for metric in facts.metrics[candidate]))
    measured.sort(key=lambda metric: metric != facts.gate_metric)
    rows = [_row(facts, metric, candidates) for metric in measured]
    gate = rows[0] if rows and rows[0].decides else None
    harness = [_harness_row(row) for row in facts.harness]
    return Comparison(candidates, rows, harness, gate, _gate_chart(facts, candidates) if gate else None)


def _gate_chart(facts: ReportFacts, candidates: list[str]) -> Markup:
    metric = facts.gate_metric
    return gate_chart(metric, _values(facts, metric, candidates), facts.differences.get(metric))


def _values(facts: ReportFacts, metric: str, candidates: list[str]) -> dict[str, float]:
    return {name: facts.metrics[name][metric] for name in candidates if metric in facts.metrics[name]}


def _row(facts: ReportFacts, metric: str, candidates: list[str]) -> MetricRow:
    values = _values(facts, metric, candidates)
    lower_is_better = metric in LOWER_IS_BETTER
    difference = facts.differences.get(metric)
    return MetricRow(
        label=spoken(metric),
        lower_is_better=lower_is_better,
        decides=metric == facts.gate_metric,
        values={name: metric_value(metric, value) for name, value in values.items()},
        intervals={name: _ends(metric, facts.intervals.get(name, {}).get(metric)) for name in values},
        best=_best(values, lower_is_better),
        change=_change(metric, spoken(metric), difference, lower_is_better) if difference else None,
    )


def _harness_row(row: HarnessRow) -> MetricRow:
    difference = row.differences.get("base")
    return MetricRow(
        label=row.name,
        lower_is_better=row.lower_is_better,
        decides=False,
        values={name: metric_value(row.name, value) for name, value in row.values.items()},
        intervals={},
        best=_best(row.values, row.lower_is_better),
        change=_change(row.name, row.name, difference, row.lower_is_better) if difference else None,
    )


def _best(values: dict[str, float], lower_is_better: bool) -> str | None:
    best = (min if lower_is_better else max)(values.values())
    leaders = [name for name, value in values.items() if value == best]
    return leaders[0] if len(leaders) == 1 and len(values) > 1 else None


def _ends(metric: str, interval: Sequence[float] | None) -> str:
    return " to ".join(metric_value(metric, end) for end in interval) if interval else ""


def _change(metric: str, label: str, difference: Interval, lower_is_better: bool) -> Change:
    result = outcome(difference, lower_is_better)
    low, high = metric_change(metric, difference.low), metric_change(metric, difference.high)
    said = f"{label}: 95% interval {low} to {high}"
    return Change(
        estimate=metric_change(metric, difference.estimate),
        low=low,
        high=high,
        unit=change_unit(metric),
        outcome=result,
        glyph=interval_glyph(metric, difference, result, lower_is_better, said),
    )


SHORT_ANSWER = 40
REJECTED_SHOWN = 500


@dataclass(frozen=True)
class TrainingFigures:
    """The training charts, and the figures beside them."""

    loss: Markup
    parts: Markup
    zero_parts: list[str]
    others: dict[str, Markup]
    tokens_per_second: float


def render_report(facts: ReportFacts, out: Path) -> None:
    """Write the report to `out` in one atomic step; its bytes depend on `facts` alone."""
    page = (
        _environment()
        .get_template("template.html.j2")
        .render(
            facts=facts,
            comparison=compare(facts),
            training=_training_figures(facts.training) if facts.training else None,
            layer_figures=layer_figures(facts.layers),
            lost_shares=lost_shares(facts.layers),
            layers_in_panels=bool(layer_panels(facts.layers)),
            stage_bars=_stage_bars(facts),
            rejected_shown=REJECTED_SHOWN,
        )
    )
    atomic_write(out, page)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        spoken=formats.spoken, significant=formats.significant, duration=formats.duration, scalar=formats.scalar
    )
    environment.globals.update(relative=relative, is_short=_is_short, is_right=_is_right)
    return environment


def _training_figures(records: charts.Records) -> TrainingFigures:
    return TrainingFigures(
        loss=charts.loss_chart(records),
        parts=charts.parts_chart(records),
        zero_parts=charts.zero_parts(records),
        others={
            key: charts.series_chart(records, key)
            for key in ("learning_rate", "gradient_norm", "tokens_per_second")
            if all(key in record for record in records)
        },
        tokens_per_second=sum(record["tokens_per_second"] for record in records) / len(records),
    )


def _stage_bars(facts: ReportFacts) -> list[Markup]:
    longest = max((stage.seconds for stage in facts.stages), default=0.0)
    return [charts.stage_bar(stage.name, stage.status, stage.seconds, longest) for stage in facts.stages]


def _is_short(sample: SampleFacts) -> bool:
    return all(len(text) <= SHORT_ANSWER for text in [*sample.references, *sample.outputs.values()])


def _is_right(output: str, sample: SampleFacts) -> bool:
    return output.strip() in [reference.strip() for reference in sample.references]
