"""The commands around a run, `kasa run`, `retrain`, `submit`, `plan`, `recipes` and `doctor`, and what they print."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from kasa.errors import KasaError
from pipeline.cli.shared import (
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    WorkspaceOption,
    duration_text,
    out,
    plain_table,
    print_json,
    show,
    size_text,
    uncut,
)
from pipeline.config.recipe import load_recipe, recipe_values
from pipeline.core.console import ProgressBars

if TYPE_CHECKING:
    from pipeline.apps.doctor import Finding
    from pipeline.apps.dry_run import RunPlan
    from pipeline.apps.plan import Estimate, StageMemory
    from pipeline.metrics.intervals import Interval
    from pipeline.run.flow import RunResult


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs on each node; default: as the recipe has it.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes with that many GPUs each.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="The GPU's name, such as H100: sets its memory and peak.")] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(min=1, help="Memory of one GPU in GiB.")] = None,
    peak_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Peak of one worker in TFLOPS, in the recipe's precision.")
    ] = None,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak that training reaches.")] = 0.4,
    as_json: JsonOption = False,
) -> None:
    """Say what a recipe needs, from the model's configuration alone: memory by ZeRO stage, steps, FLOPs, time, disk."""
    from pipeline.apps.plan import plan_training
    from pipeline.apps.plan_compute import hardware_of

    resolved, hardware = hardware_of(
        load_recipe(recipe, overrides), gpus, nodes, gpu, gpu_memory_gib, peak_tflops, utilisation
    )
    show(plan_training(resolved, hardware), as_json, estimate_json, show_estimate)


def recipes(as_json: JsonOption = False) -> None:
    """List the recipes that come along; every command that takes a recipe takes their names."""
    from pipeline.config.recipe import catalogue, recipes_json, show_recipes

    named = list(catalogue())
    print_json(recipes_json(named)) if as_json else show_recipes(named)


def doctor(workspace: WorkspaceOption = Path("workspace"), as_json: JsonOption = False) -> None:
    """Say what this machine has and lacks for a run; exit code 2 if a run cannot work."""
    from pipeline.apps.doctor import examine

    findings = examine(workspace)
    show(findings, as_json, _findings_json, _show_findings)
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(2)


def plan_json(plan: RunPlan) -> dict[str, Any]:
    """The values of a dry run for JSON."""
    return {
        "recipe": recipe_values(plan.recipe),
        "stages": [dataclasses.asdict(stage) for stage in plan.stages],
        "fetches": list(plan.fetches),
        "refused": list(plan.refused),
        "not_checked": list(plan.not_checked),
        "estimate": estimate_json(plan.estimate),
    }


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """The values of an estimate for JSON, derived ones included."""
    totals = [{"device_gib": stage.device_gib, "host_gib": stage.host_gib} for stage in estimate.stages]
    values = dataclasses.asdict(estimate)
    return values | {
        "stages": [stage | total for stage, total in zip(values["stages"], totals, strict=True)],
        "trainable_share": estimate.trainable_share,
        "device_gib": estimate.memory.device_gib if estimate.memory else None,
        "host_gib": estimate.memory.host_gib if estimate.memory else None,
        "recommended": estimate.recommended,
        "step_seconds": estimate.step_seconds,
        "training_seconds": estimate.training_seconds,
    }


def show_plan(plan: RunPlan) -> None:
    """Print the resolved recipe, then what would be done and what it takes."""
    out.print(escape(yaml.safe_dump(recipe_values(plan.recipe), sort_keys=False)))
    table = plain_table("stage", "plan", "key", "why")
    for stage in plan.stages:
        table.add_row(
            stage.name, stage.action, stage.key or "known once the inputs are fetched", escape("; ".join(stage.reasons))
        )
    out.print(table)
    for name in plan.fetches:
        out.print(f"fetch first: {escape(name)}")
    out.print()
    show_estimate(plan.estimate)
    for line in plan.not_checked:
        out.print(f"not checked: {line}", markup=False)
    out.print("dry run: nothing was made")


def show_estimate(estimate: Estimate) -> None:
    """Print parameters, steps and time, disk, spectra, memory by ZeRO stage, and what is unknown."""
    if estimate.trainable_parameters is not None and estimate.trainable_share is not None:
        out.print(
            f"parameters  {estimate.base_parameters:,} in the base; {estimate.trainable_parameters:,} trained "
            f"({estimate.trainable_share:.2%}) in {estimate.adapted_modules} modules"
        )
    steps = f"{estimate.optimizer_steps:,} steps" if estimate.optimizer_steps else "as many steps as the data has"
    share = f"{estimate.micro_batch} samples x {estimate.gradient_accumulation} accumulation steps"
    if estimate.pack_tokens is not None:
        share = f"micro-batches of up to {estimate.pack_tokens} packed tokens"
    out.print(f"training    {steps} of {estimate.global_batch} samples: {estimate.workers} workers x {share}")
    if estimate.step_flops is not None:
        out.print(f"compute     {_compute(estimate)}")
    if estimate.checkpoint_gib is not None and estimate.adapter_gib is not None:
        checkpoint, adapter = (size_text(gib * 2**30) for gib in (estimate.checkpoint_gib, estimate.adapter_gib))
        out.print(f"disk        {checkpoint} a checkpoint, {adapter} the adapter")
    if (spectra := estimate.spectra) is not None:
        calibration = f"; {spectra.calibration_gib:.1f} GiB of covariances a worker" if spectra.calibration_gib else ""
        out.print(
            f"spectra     {spectra.weights} weights, {spectra.flops:.1e} FLOPs in fp64, about "
            f"{duration_text(spectra.core_seconds)} of one core; up to {spectra.task_gib:.1f} GiB a task{calibration}"
        )
    if estimate.memory is not None:
        out.print()
        out.print(_memory_table(estimate))
        out.print(_activations(estimate))
    for reason in estimate.unknown:
        out.print(f"unknown     {escape(reason)}")


def _compute(estimate: Estimate) -> str:
    hardware = estimate.hardware
    text = f"{estimate.step_flops:.2e} FLOPs a step of rows of {estimate.mean_row_tokens:.0f} tokens"
    if estimate.step_seconds is not None:
        whole = f", {duration_text(estimate.training_seconds)} in all" if estimate.training_seconds is not None else ""
        rate = f"{hardware.utilisation:.0%} of {hardware.peak_tflops:g} TFLOPS a worker"
        text += f": {estimate.step_seconds:.2f} s at {rate}{whole}"
    return text


def _memory_table(estimate: Estimate) -> Table:
    """Memory of one worker in GiB: a row for each use, a column for each DeepSpeed configuration."""
    table = plain_table("GiB a worker")
    own = estimate.memory.deepspeed if estimate.memory else ""
    for stage in estimate.stages:
        table.add_column(f"{stage.deepspeed}{' *' if stage.deepspeed == own else ''}", justify="right")
    kinds = dict.fromkeys(item.kind for stage in estimate.stages for item in stage.items)
    for kind in kinds:
        table.add_row(kind, *(_cell(stage, kind) for stage in estimate.stages))
    where = "GPU" if estimate.gpu else "in all"
    table.add_row(f"[bold]{where}[/]", *(f"[bold]{stage.device_gib:.2f}[/]" for stage in estimate.stages))
    if estimate.gpu:
        table.add_row("host (h)", *(f"{stage.host_gib:.2f}" for stage in estimate.stages))
    if estimate.hardware.gpu_memory_gib is not None:
        fits = ["refused" if s.refused else "yes" if s.fits else "no" for s in estimate.stages]
        table.add_row(f"fits {estimate.hardware.gpu_memory_gib:g} GiB", *fits)
    return uncut(table)


def _cell(stage: StageMemory, kind: str) -> str:
    return next((f"{item.gib:.2f}{' h' if item.on_host else ''}" for item in stage.items if item.kind == kind), "-")


def _activations(estimate: Estimate) -> str:
    """The remarks below the table: its mark, what checkpointing changes, and what to choose."""
    notes = ["* as the recipe has it"]
    if estimate.activations_gib is not None:
        notes.append(
            f"activations {estimate.activations_gib:.2f} GiB, with gradient checkpointing "
            f"{estimate.activations_checkpointed_gib:.2f}"
        )
    notes += [f"{stage.deepspeed} is refused {stage.refused}" for stage in estimate.stages if stage.refused]
    if estimate.recommended:
        notes.append(f"train.deepspeed={estimate.recommended} fits and communicates least")
    elif estimate.hardware.gpu_memory_gib is not None:
        notes.append("nothing fits: lower train.micro_batch_size, or set train.gradient_checkpointing=true")
    return escape("; ".join(notes))


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
        bool, typer.Option("--dry-run", help="Show the resolved recipe and the plan; touch nothing.")
    ] = False,
    force: Annotated[
        list[str] | None, typer.Option("--force", metavar="STAGE", help="Recompute this stage; may be given again.")
    ] = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Recompute this stage and all after it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: prepare, spectra, audit, train, evaluate, register. What is unchanged is reused."""
    resolved = load_recipe(recipe, overrides)
    from pipeline.run.graph import stages_to_recompute

    recompute = stages_to_recompute(force or [], from_)
    if dry_run:
        from pipeline.apps.dry_run import plan_run
        from pipeline.cli.run import plan_json, show_plan

        planned = plan_run(resolved, recompute)
        show(planned, as_json, plan_json, show_plan)
        if planned.refused:
            raise KasaError("\n".join(planned.refused))
        return
    from pipeline.run.flow import run as run_flow

    show(run_flow(resolved, ProgressBars(), recompute), as_json, result_json, show_result)


def retrain(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Where another retraining is running, wait for its end.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe if its data, base, settings or code are new since the last retraining: for a scheduler to call."""
    resolved = load_recipe(recipe, overrides)
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
    as_json: JsonOption = False,
) -> None:
    """Run a recipe as a job on a Ray cluster; the same submission twice is one job."""
    from pipeline.apps.submit import submit_and_follow

    outcome = submit_and_follow(recipe, overrides or [], address, follow, again, env or [])
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
