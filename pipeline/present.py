"""Results for people (rich) and for programs (JSON)."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.evaluation.metrics import LOWER_IS_BETTER
from pipeline.flow import RunResult

_out = Console(highlight=False, soft_wrap=True)


def result_json(result: RunResult) -> dict[str, Any]:
    """The run as one JSON object."""
    decision = result.registration.decision
    return {
        "run_id": result.parent_run,
        "stage_runs": result.stage_runs,
        "stages": result.stage_status,
        "seconds": {**result.stage_seconds, "total": result.seconds},
        "artifacts": {name: str(folder) for name, folder in result.artifacts.items()},
        "metrics": result.evaluation.metrics,
        "differences": {
            opponent: {metric: vars(difference) for metric, difference in differences.items()}
            for opponent, differences in result.evaluation.differences.items()
        },
        "model": {
            "name": result.registration.model.name,
            "version": result.registration.model.version,
            "uri": result.registration.uri,
            "promoted": decision.promote,
            "reason": decision.reason,
        },
        "report": str(result.report),
        "commands": result.commands,
    }


def show_result(result: RunResult) -> None:
    """Metrics, verdict, where things are, and what to type next."""
    _out.print(_metrics_table(result))
    decision = result.registration.decision
    colour, word = ("green", "promoted to champion") if decision.promote else ("yellow", "registered, not promoted")
    model = result.registration.model
    _out.print(f"[{colour}]{escape(model.name)} version {model.version}: {word}[/] ({escape(decision.reason)})")
    stages = ", ".join(
        f"{name} {'reused' if status == 'reused' else f'{result.stage_seconds[name]:.0f} s'}"
        for name, status in result.stage_status.items()
    )
    _out.print(f"stages   {stages}; {result.seconds:.0f} s in all")
    _out.print(f"report   {result.report}")
    _out.print(f"adapter  {result.artifacts['train'] / 'adapter'}")
    for caption, command in result.commands.items():
        _out.print(f"\n{caption}:\n  {escape(command)}")


def _metrics_table(result: RunResult) -> Table:
    metrics = result.evaluation.metrics
    against = result.evaluation.differences["base"]
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    table.add_column("held out")
    for candidate in metrics:
        table.add_column(candidate, justify="right")
    table.add_column("adapted - base, 95% interval", justify="right")
    for metric in metrics["base"]:
        difference = against.get(metric)
        interval = f"{difference.estimate:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]" if difference else ""
        name = f"{metric} (lower is better)" if metric in LOWER_IS_BETTER else metric
        table.add_row(name, *(f"{values[metric]:.3f}" for values in metrics.values()), interval)
    return table
