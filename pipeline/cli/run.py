"""The commands around a run, `kasa run`, `retrain`, `submit` and `doctor`, and what they print."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from kasa.errors import KasaError
from pipeline.cli.shared import (
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    RunWorkspaceOption,
    TuneOption,
    WorkspaceOption,
    out,
    plain_table,
    print_json,
    read_recipe,
    show,
    with_workspace,
)
from pipeline.core.console import ProgressBars, console

if TYPE_CHECKING:
    from pipeline.apps.compared_methods import ComparisonPlan
    from pipeline.apps.doctor import Finding
    from pipeline.config.recipe import Recipe
    from pipeline.metrics.intervals import Interval
    from pipeline.run.flow import RunResult


def doctor(workspace: WorkspaceOption = Path("workspace"), as_json: JsonOption = False) -> None:
    """Say what this machine has and lacks for a run; exit code 2 if a run cannot work."""
    from pipeline.apps.doctor import examine

    findings = examine(workspace)
    show(findings, as_json, _findings_json, _show_findings)
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(2)


def _findings_json(findings: Sequence[Finding]) -> list[dict[str, str]]:
    return [dataclasses.asdict(finding) for finding in findings]


def _show_findings(findings: Sequence[Finding]) -> None:
    """Print a line for each finding, with the remedy where one is needed."""
    marks = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        out.print(f"{marks[finding.status]} {finding.name:<{width}}  {escape(finding.detail)}")
        if finding.remedy:
            out.print(f"     {'':<{width}}  -> {escape(finding.remedy)}")


def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved recipe and the plan; make nothing.")
    ] = False,
    force: Annotated[
        list[str] | None, typer.Option("--force", metavar="STAGE", help="Recompute this stage; may be given again.")
    ] = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Recompute this stage and all after it.")
    ] = None,
    tune: TuneOption = None,
    workspace: RunWorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: prepare, spectra, audit, train, evaluate, register. What is unchanged is reused."""
    resolved = read_recipe(recipe, overrides, workspace)
    from pipeline.run.graph import stages_to_recompute

    recompute = stages_to_recompute(force or [], from_)
    tuning = None
    if tune:
        from pipeline.apps.compared_methods import plan_tuning  # torch

        tuning = plan_tuning(resolved, tune)
    if dry_run:
        from pipeline.apps.dry_run import plan_run
        from pipeline.cli.plan import plan_json, show_plan

        if tuning:
            rates = ", ".join(f"{rate:g}" for rate in tuning.rates)
            console.print(
                f"tune: {len(tuning.rates)} trainings first, at the learning rates {rates}; the best one is kept"
            )
        planned = plan_run(resolved, recompute)
        show(planned, as_json, plan_json, show_plan)
        if planned.refused:
            raise KasaError("\n".join(planned.refused))
        return
    if tuning:
        resolved = _tuned(tuning)
    from pipeline.run.flow import run as run_flow

    show(run_flow(resolved, ProgressBars(), recompute), as_json, result_json, show_result)


def _tuned(tuning: ComparisonPlan) -> Recipe:
    """The recipe at the learning rate with the lowest validation loss, which is said."""
    from pipeline.apps.compare import tune

    chosen = tune(tuning, ProgressBars())
    losses = ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in sorted(chosen.losses.items()))
    console.print(f"tuned: train.learning_rate={chosen.rate:g} (validation loss {losses})")
    if chosen.at_edge:
        console.print("tuned: a better rate may lie beyond those tried; name others with --tune learning_rate=A,B,...")
    return tuning.recipe_at(chosen.rate)


def retrain(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Where another retraining is running, wait for its end.")
    ] = False,
    workspace: RunWorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe if its data, base, settings or code are new since the last retraining: for a scheduler to call."""
    resolved = read_recipe(recipe, overrides, workspace)
    from pipeline.apps.retrain import outcome_json, retrain_if_new

    outcome = retrain_if_new(resolved, wait)
    if as_json:
        print_json(outcome_json(outcome) | (result_json(outcome.result) if outcome.result else {}))
    elif outcome.result:
        show_result(outcome.result)
    else:
        print(f"nothing to do: {outcome.reason}")


def submit(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, such as http://HEAD:8265."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show the job's log until it ends; the exit code is the job's.")
    ] = True,
    again: Annotated[
        bool, typer.Option("--again", help="Start it again though the same job has succeeded before.")
    ] = False,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="One more environment variable for the job.")
    ] = None,
    workspace: RunWorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe as a job on a Ray cluster; the same submission twice is one job."""
    from pipeline.apps.submit import submit_and_follow

    outcome = submit_and_follow(recipe, with_workspace(overrides, workspace), address, follow, again, env or [])
    if as_json:
        print_json(outcome.as_json())
    raise typer.Exit(outcome.exit_code)


def result_json(result: RunResult) -> dict[str, Any]:
    """The values of a run for JSON."""
    decision = result.registration.decision
    return {
        "run_id": result.parent_run,
        "stage_runs": result.stage_runs,
        "stages": result.stage_status,
        "seconds": {**result.stage_seconds, "total": result.seconds},
        "artifacts": {name: str(folder) for name, folder in result.artifacts.items()},
        "metrics": result.evaluation.metrics,
        "intervals": result.evaluation.intervals,
        "differences": {
            opponent: {metric: vars(difference) for metric, difference in differences.items()}
            for opponent, differences in result.evaluation.differences.items()
        },
        "harness": [dataclasses.asdict(row) for row in result.evaluation.harness],
        "model": {
            "name": result.registration.model.name,
            "version": result.registration.model.version,
            "uri": result.registration.uri,
            "promoted": decision.promote,
            "reason": decision.reason,
            "aliases": list(result.registration.aliases),
        },
        "report": str(result.report),
        "commands": result.commands,
    }


def show_result(result: RunResult) -> None:
    """Print metrics, verdict, where things are, and what to type next."""
    out.print(_metrics_table(result))
    if result.evaluation.harness:
        out.print(_harness_table(result))
    registration = result.registration
    decision, model = registration.decision, registration.model
    colour, word = ("green", "promoted to champion") if decision.promote else ("yellow", "registered, not promoted")
    if registration.is_champion != decision.promote:
        word = "not promoted, champion by hand" if registration.is_champion else "promoted, not the champion any more"
    out.print(f"[{colour}]{escape(model.name)} version {model.version}: {word}[/] ({escape(decision.reason)})")
    stages = ", ".join(
        f"{name} {'reused' if status == 'reused' else f'{result.stage_seconds[name]:.0f} s'}"
        for name, status in result.stage_status.items()
    )
    out.print(f"stages   {stages}; {result.seconds:.0f} s in all")
    out.print(f"report   {result.report}")
    out.print(f"adapter  {result.artifacts['train'] / 'adapter'}")
    for caption, command in result.commands.items():
        out.print(f"\n{caption}:\n  {escape(command)}")


def _metrics_table(result: RunResult) -> Table:
    from pipeline.metrics.catalogue import LOWER_IS_BETTER, METRICS

    metrics, intervals = result.evaluation.metrics, result.evaluation.intervals
    against = result.evaluation.differences["base"]
    table = plain_table()
    table.add_column("held out, 95% interval", no_wrap=True)
    for candidate in metrics:
        table.add_column(candidate, justify="right")
    table.add_column("adapted - base", justify="right")
    for metric in (name for name in METRICS if name in metrics["base"]):
        name = _named(metric, metric in LOWER_IS_BETTER)
        own = (f"{values[metric]:.3f} {_ends(intervals[candidate][metric])}" for candidate, values in metrics.items())
        table.add_row(name, *own, _change(against.get(metric)))
    return table


def _harness_table(result: RunResult) -> Table:
    candidates = list(result.evaluation.metrics)
    table = plain_table()
    for column in ("\nlm-evaluation-harness", *candidates, "adapted - base"):
        table.add_column(column, justify="left" if column.startswith("\n") else "right", vertical="bottom")
    for row in result.evaluation.harness:
        values = (f"{row.values[name]:.3f}" if name in row.values else "" for name in candidates)
        table.add_row(_named(row.name, row.lower_is_better), *values, _change(row.differences.get("base")))
    return table


def _named(metric: str, lower_is_better: bool) -> str:
    return f"{metric} (lower is better)" if lower_is_better else metric


def _change(difference: Interval | None) -> str:
    return difference.text("{:+.3f}".format) if difference else ""


def _ends(interval: Sequence[float]) -> str:
    return f"[dim]\\[{interval[0]:.3f}, {interval[1]:.3f}][/]"
