"""The architecture in one file: six stages, each named by what it does.

    base + data ── prepare ── spectra ── audit ── train ── evaluate ── register ── report

Spectra look at the training text, unless `adapter.truncation` says otherwise; then they depend on the base alone. Every
stage is content-addressed (`pipeline.keys`), so what is unchanged is reused, and each is an MLflow run under the run's
parent (`pipeline.context`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kasa.targets import check_rank
from pipeline import keys
from pipeline.artifacts import Artifact
from pipeline.base_model import BaseModel, find_base
from pipeline.cluster import ray_cluster
from pipeline.console import ProgressBars
from pipeline.context import RunContext, check_workspace, close_context, open_context
from pipeline.prepare.sources import DataSources, resolve_sources
from pipeline.recipe import Recipe, recipe_values
from pipeline.report.gather import environment_tags, use_commands, write_report
from pipeline.stages.audit import audit
from pipeline.stages.evaluate import Evaluation, evaluate
from pipeline.stages.prepare import prepare
from pipeline.stages.register import Registration, register
from pipeline.stages.spectra import spectra
from pipeline.stages.train import deepspeed_settings, train


@dataclass(frozen=True)
class RunResult:
    """What a complete run leaves behind."""

    parent_run: str
    stage_runs: dict[str, str]
    stage_seconds: dict[str, float]
    stage_status: dict[str, str]
    artifacts: dict[str, Path]
    evaluation: Evaluation
    registration: Registration
    report: Path
    commands: dict[str, str]
    seconds: float


def run(recipe: Recipe, bars: ProgressBars) -> RunResult:
    """Run the recipe to its end, going on from whatever an earlier run of it left.

    Raises:
        KasaError: a mistake in the recipe, the data, the base or the environment; what was made so far is kept.
    """
    started = time.perf_counter()
    deepspeed_settings(recipe)  # a mistake in it should not wait for the stage that needs it
    check_workspace(recipe.workspace)
    base, sources = _find_inputs(recipe)
    targets = base.targets(recipe.adapter.targets)
    check_rank(targets, recipe.adapter.rank, "adapter.rank")
    check_rank(targets, recipe.spectra_rank, "spectra.rank")

    context = open_context(recipe, bars, environment_tags())
    with (
        context.tracking.open_run(context.parent_run),
        ray_cluster(recipe.workspace, *needed_resources(recipe)),
        bars.showing(),
    ):
        context.tracking.log_parameters(context.parent_run, recipe_values(recipe))
        prepared = prepare(context, base, sources)
        decomposed = spectra(context, base, targets, prepared)
        audited = audit(context, base, targets, prepared, decomposed)
        adapter = train(context, base, targets, prepared, decomposed)
        evaluation = evaluate(context, base, prepared, adapter)
        registration = register(context, base, sources, prepared, adapter, evaluation)
        artifacts = {
            "prepare": prepared,
            "spectra": decomposed,
            "audit": audited,
            "train": adapter,
            "evaluate": evaluation.artifact,
        }
        report = write_report(context, artifacts, evaluation, registration)
    close_context(context)
    return _result(context, artifacts, evaluation, registration, report, time.perf_counter() - started)


def needed_resources(recipe: Recipe) -> tuple[float, int]:
    """CPU cores and GPUs that the hungriest stage reserves at once."""
    training = recipe.train.workers * recipe.train.cpus_per_worker
    workers = max(recipe.train.workers, recipe.evaluate.workers)
    return max(training, recipe.evaluate.workers, 1), workers if recipe.train.gpu else 0


def _find_inputs(recipe: Recipe) -> tuple[BaseModel, DataSources]:
    # The data first: a wrong path should not wait for a download of the base.
    sources = resolve_sources(recipe.data, recipe.workspace)
    base = find_base(recipe.base, recipe.workspace)
    assert sources is not None
    assert base is not None
    return base, sources


def _result(
    context: RunContext,
    artifacts: dict[str, Artifact],
    evaluation: Evaluation,
    registration: Registration,
    report: Path,
    seconds: float,
) -> RunResult:
    stages: dict[str, Any] = {facts.name: facts for facts in context.finished}
    order = [name for name in keys.STAGES if name in stages]
    return RunResult(
        parent_run=context.parent_run,
        stage_runs={name: stages[name].mlflow_run_id for name in order},
        stage_seconds={name: stages[name].seconds for name in order},
        stage_status={name: stages[name].status for name in order},
        artifacts={name: artifact.folder for name, artifact in artifacts.items()},
        evaluation=evaluation,
        registration=registration,
        report=report,
        commands=use_commands(context, registration),
        seconds=seconds,
    )
