"""The commands that look ahead, `kasa plan` and `kasa recipes`, and what they and a dry run print."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from pipeline.cli.shared import (
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    RunWorkspaceOption,
    duration_text,
    out,
    plain_table,
    read_recipe,
    show,
    size_text,
    uncut,
)
from pipeline.config.recipe import NamedRecipe, catalogue, recipe_values

if TYPE_CHECKING:
    from pipeline.apps.dry_run import RunPlan
    from pipeline.apps.plan import Estimate, StageMemory


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs on each node; default: as the recipe has it.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes with that many GPUs each.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="The GPU's name, such as H100: sets its memory and peak.")] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(min=1, max=1e6, help="Memory of one GPU in GiB.")] = None,
    peak_tflops: Annotated[
        float | None, typer.Option(min=0.001, max=1e9, help="Peak of one worker in TFLOPS, in the recipe's precision.")
    ] = None,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak that training reaches.")] = 0.4,
    workspace: RunWorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a recipe needs, from the model's configuration alone: memory by ZeRO stage, steps, FLOPs, time, disk."""
    from pipeline.apps.plan import plan_training
    from pipeline.apps.plan_compute import hardware_of

    resolved, hardware = hardware_of(
        read_recipe(recipe, overrides, workspace), gpus, nodes, gpu, gpu_memory_gib, peak_tflops, utilisation
    )
    show(plan_training(resolved, hardware), as_json, estimate_json, show_estimate)


def recipes(as_json: JsonOption = False) -> None:
    """List the recipes that come along; every command that takes a recipe takes their names."""
    show(list(catalogue()), as_json, _recipes_json, _show_recipes)


def _recipes_json(named: Sequence[NamedRecipe]) -> list[dict[str, Any]]:
    """The recipes as JSON objects."""
    return [
        {
            "name": one.name,
            "family": one.family,
            **one.recipe.about.model_dump(mode="json"),
            "base": one.recipe.base.model,
            "hardware": one.hardware,
            "fetched": one.fetched,
        }
        for one in named
    ]


def _show_recipes(named: Sequence[NamedRecipe]) -> None:
    """Print the recipes as a table; a line each where the output is no terminal."""
    table = Table(box=None, header_style="bold")
    table.add_column("recipe", no_wrap=True)
    for heading in ("what", "settings", "trains on"):
        table.add_column(heading)
    for one in named:
        about = one.recipe.about
        table.add_row(one.name, escape(about.summary), about.settings, one.hardware)
    out.print(table if out.is_terminal else uncut(table))
    out.print("kasa run NAME --dry-run shows one; data.train=FILE and base.model=FOLDER name local copies", style="dim")


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
    if estimate.train_rows is None and estimate.optimizer_steps:
        steps = f"at most {steps}"
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
            f"{duration_text(spectra.core_seconds)} of one core before the first step; up to {spectra.task_gib:.1f} GiB a task{calibration}"
        )
    if estimate.memory is not None:
        out.print()
        out.print(_memory_table(estimate))
        out.print(_activations(estimate))
    for reason in estimate.warnings:
        out.print(f"[yellow]warning[/]     {escape(reason)}")
    for reason in estimate.unknown:
        out.print(f"unknown     {escape(reason)}")


def _compute(estimate: Estimate) -> str:
    hardware = estimate.hardware
    text = f"{estimate.step_flops:.2e} FLOPs a step of rows of {estimate.mean_row_tokens:.0f} tokens"
    if estimate.step_seconds is not None:
        whole = f", {duration_text(estimate.training_seconds)} for all steps" if estimate.training_seconds else ""
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
    notes += [f"{stage.deepspeed} is refused: {stage.refused}" for stage in estimate.stages if stage.refused]
    if estimate.recommended:
        notes.append(f"train.deepspeed={estimate.recommended} fits and communicates least")
    elif estimate.hardware.gpu_memory_gib is not None:
        notes.append("nothing fits: lower train.micro_batch_size, or set train.gradient_checkpointing=true")
    return escape("; ".join(notes))
