"""The report: one HTML file that needs no network, no server and no other file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import charts, formats
from pipeline.report.comparison import compare
from pipeline.report.facts import ReportFacts, SampleFacts
from pipeline.report.layer_charts import layer_figures, layer_panels, lost_shares, relative
from pipeline.storage.whole_file import write_whole

SHORT_ANSWER = 40
REJECTED_SHOWN = 500


@dataclass(frozen=True)
class TrainingFigures:
    """The training charts, with what stands in words beside them."""

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
    write_whole(out, page)


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
