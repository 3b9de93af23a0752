"""Results for people (rich) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.config.recipe import recipe_values
from pipeline.metrics.catalogue import LOWER_IS_BETTER, METRICS

if TYPE_CHECKING:
    from pipeline.apps.doctor import Finding
    from pipeline.apps.planning.dry_run import RunPlan
    from pipeline.apps.planning.plan import Estimate, StageMemory
    from pipeline.metrics.intervals import Interval
    from pipeline.run.flow import RunResult
    from pipeline.serving.export import Exported

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
    """Metrics, verdict, where things are, and what to type next."""
    _out.print(_metrics_table(result))
    if result.evaluation.harness:
        _out.print(_harness_table(result))
    registration = result.registration
    decision, model = registration.decision, registration.model
    colour, word = ("green", "promoted to champion") if decision.promote else ("yellow", "registered, not promoted")
    if registration.is_champion != decision.promote:
        word = "not promoted, champion by hand" if registration.is_champion else "promoted, not the champion any more"
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
    metrics, intervals = result.evaluation.metrics, result.evaluation.intervals
    against = result.evaluation.differences["base"]
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
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
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
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


def plan_json(plan: RunPlan) -> dict[str, Any]:
    """The plan as one JSON object."""
    return {
        "recipe": recipe_values(plan.recipe),
        "stages": [dataclasses.asdict(stage) for stage in plan.stages],
        "fetches": list(plan.fetches),
        "estimate": estimate_json(plan.estimate),
    }


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """The estimate as JSON values, with what follows from them."""
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
    """The resolved recipe, then what would be done and what it takes."""
    _out.print(escape(yaml.safe_dump(recipe_values(plan.recipe), sort_keys=False)))
    table = Table("stage", "plan", "key", "why", box=None, pad_edge=False, header_style="bold")
    for stage in plan.stages:
        table.add_row(
            stage.name, stage.action, stage.key or "known once the inputs are fetched", escape("; ".join(stage.reasons))
        )
    _out.print(table)
    for name in plan.fetches:
        _out.print(f"fetch first: {escape(name)}")
    _out.print()
    show_estimate(plan.estimate)
    _out.print("dry run: nothing was made")


def show_estimate(estimate: Estimate) -> None:
    """Parameters, steps and time, memory by ZeRO stage, disk, spectra, and what is unknown."""
    if estimate.trainable_parameters is not None and estimate.trainable_share is not None:
        _out.print(
            f"parameters  {estimate.base_parameters:,} in the base; {estimate.trainable_parameters:,} trained "
            f"({estimate.trainable_share:.2%}) in {estimate.adapted_modules} modules"
        )
    steps = f"{estimate.optimizer_steps:,} steps" if estimate.optimizer_steps else "as many steps as the data has"
    passes = f"{estimate.micro_batch} samples x {estimate.gradient_accumulation} passes"
    if estimate.pack_tokens is not None:
        passes = f"passes of up to {estimate.pack_tokens} packed tokens"
    _out.print(f"training    {steps} of {estimate.global_batch} samples: {estimate.workers} workers x {passes}")
    if estimate.step_flops is not None:
        _out.print(f"compute     {_compute(estimate)}")
    if estimate.checkpoint_gib is not None and estimate.adapter_gib is not None:
        _out.print(
            f"disk        {_gib(estimate.checkpoint_gib)} a checkpoint, {_gib(estimate.adapter_gib)} the adapter"
        )
    if (spectra := estimate.spectra) is not None:
        calibration = f"; {spectra.calibration_gib:.1f} GiB of covariances a worker" if spectra.calibration_gib else ""
        _out.print(
            f"spectra     {spectra.weights} weights, {spectra.flops:.1e} FLOPs in fp64, about "
            f"{_duration(spectra.core_seconds)} of one core; up to {spectra.task_gib:.1f} GiB a task{calibration}"
        )
    if estimate.memory is not None:
        _out.print()
        _out.print(_memory_table(estimate))
        _out.print(_activations(estimate))
    for reason in estimate.unknown:
        _out.print(f"unknown     {escape(reason)}")


def _compute(estimate: Estimate) -> str:
    hardware = estimate.hardware
    text = f"{estimate.step_flops:.2e} FLOPs a step of rows of {estimate.mean_row_tokens:.0f} tokens"
    if estimate.step_seconds is not None:
        whole = f", {_duration(estimate.training_seconds)} in all" if estimate.training_seconds is not None else ""
        rate = f"{hardware.utilisation:.0%} of {hardware.peak_tflops:g} TFLOPS a worker"
        text += f": {estimate.step_seconds:.2f} s at {rate}{whole}"
    return text


def _memory_table(estimate: Estimate) -> Table:
    """GiB of one worker: a row for each use, a column for each DeepSpeed configuration."""
    table = Table("GiB a worker", box=None, pad_edge=False, header_style="bold")
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
    # Names that are to be copied must not be cut, however narrow the terminal.
    table.width = _out.measure(table, options=_out.options.update(width=1000)).maximum
    return table


def _cell(stage: StageMemory, kind: str) -> str:
    return next((f"{item.gib:.2f}{' h' if item.on_host else ''}" for item in stage.items if item.kind == kind), "-")


def _activations(estimate: Estimate) -> str:
    """Below the table: what its mark means, what checkpointing changes, and what to choose."""
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


def _duration(seconds: float | None) -> str:
    if seconds is None or seconds < 120:
        return f"{seconds or 0:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _gib(size: float) -> str:
    return _bytes(round(size * 2**30))


def findings_json(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """What the doctor found, as JSON values."""
    return [dataclasses.asdict(finding) for finding in findings]


def show_findings(findings: Sequence[Finding]) -> None:
    """A line for each finding, with the remedy where one is needed."""
    marks = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        _out.print(f"{marks[finding.status]} {finding.name:<{width}}  {escape(finding.detail)}")
        if finding.remedy:
            _out.print(f"     {'':<{width}}  -> {escape(finding.remedy)}")


def exported_json(exported: Exported) -> dict[str, Any]:
    """An export as one JSON object."""
    return {**dataclasses.asdict(exported), "out": str(exported.out)}


def show_exported(exported: Exported) -> None:
    """What was written, how far it is from the adapter where that was measured, and what to type next."""
    rank = f", rank {exported.rank}" if exported.rank else ""
    dtypes = ", ".join(exported.dtypes)
    _out.print(f"{escape(str(exported.out))}: {exported.format}{rank}, {dtypes}, {_bytes(exported.size)}")
    if exported.logits:
        largest, scale = exported.logits.largest, exported.logits.largest_logit
        _out.print(f"largest logit difference from the adapter {largest:.2g}, of logits up to {scale:.3g} (fp32)")
    for note in exported.notes:
        _out.print(f"note: {escape(note)}")
    _out.print(f"\n  {escape(exported.command)}")


def _bytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
