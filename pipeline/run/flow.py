"""The architecture in one file: six stages, each named by what it does.

    base + data ── prepare ── spectra ── audit ── train ── evaluate ── register ── report

Spectra look at the training text, unless `adapter.truncation` says otherwise; then they depend on the base alone and are
made beside the data. Training begins with a new adapter, or goes on from the champion's and what that one drops
(`pipeline.run.warm_start`). Every stage is content-addressed (`pipeline.run.graph`), so what is unchanged is reused, and each is an
MLflow run under the run's parent (`pipeline.run.context`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kasa.targets import Target
from pipeline.artifacts.store import Artifact
from pipeline.cluster.connection import ray_cluster
from pipeline.config.recipe import Recipe
from pipeline.core.console import ProgressBars
from pipeline.core.provenance import code_tags
from pipeline.data.sources import DataSources, resolve_sources
from pipeline.evaluation.suitability import check_harness
from pipeline.methods.choice import check_ranks, check_registrable
from pipeline.metrics.catalogue import check_measurable
from pipeline.models.base import BaseModel, find_base
from pipeline.run import graph as keys
from pipeline.run.context import RunContext, close_context, open_context, ready_workspace, seed_tags
from pipeline.run.report_facts import environment_tags, use_commands, write_report
from pipeline.run.stages.audit import audit
from pipeline.run.stages.evaluate import Evaluation, evaluate
from pipeline.run.stages.prepare import prepare
from pipeline.run.stages.register import Registration, register
from pipeline.run.stages.spectra import spectra
from pipeline.run.stages.train import deepspeed_settings, train
from pipeline.run.warm_start import WarmStart, decide_warm_start


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


def run(
    recipe: Recipe, bars: ProgressBars, remake: Iterable[str] = (), confirm: Callable[[], None] = lambda: None
) -> RunResult:
    """Run the recipe to its end, going on from whatever an earlier run of it left.

    Args:
        remake: stages that make their artifacts anew, though they be there.
        confirm: raises where this process may not go on; asked before each stage and before the registry is changed.

    Raises:
        KasaError: a mistake in the recipe, the data, the base or the environment; what was made so far is kept.
    """
    started = time.perf_counter()
    check_registrable(recipe)
    # Mistakes in what later stages need should not wait for them.
    deepspeed_settings(recipe)
    check_measurable(recipe.evaluate.measured)
    check_harness(recipe.evaluate, recipe.base.head)
    storage = ready_workspace(recipe)
    base, sources = _find_inputs(recipe)
    targets = base.targets(recipe.adapter.targets)
    check_ranks(recipe, targets)

    storage.upload_input(base.folder, base.digest)
    tags = {**environment_tags(), **code_tags(), **seed_tags(recipe)}
    context = open_context(recipe, storage, bars, tags, remake, confirm)
    with (
        context.tracking.open_run(context.parent_run),
        ray_cluster(recipe.workspace, *needed_resources(recipe), on_connected=context.describe_cluster),
        bars.showing(),
    ):
        context.describe_run()
        prepared, decomposed, start = _prepared_and_spectra(context, base, sources, targets)
        audited = audit(context, base, targets, prepared, decomposed)
        adapter = train(context, base, sources, targets, prepared, decomposed, start)
        evaluation = evaluate(context, base, sources, prepared, adapter)
        artifacts = {
            "prepare": prepared,
            "spectra": decomposed,
            "audit": audited,
            "train": adapter,
            "evaluate": evaluation.artifact,
        }
        registration = register(context, base, sources, targets, artifacts, evaluation, start)
        report = write_report(context, artifacts, evaluation, registration)
    close_context(context)
    return _result(context, artifacts, evaluation, registration, report, time.perf_counter() - started)


def _prepared_and_spectra(
    context: RunContext, base: BaseModel, sources: DataSources, targets: Sequence[Target]
) -> tuple[Artifact, Artifact, WarmStart | None]:
    """Both, and what training goes on from."""
    recipe = context.recipe
    if recipe.calibrated or recipe.train.start == "champion":
        prepared = prepare(context, base, sources)
        start = _beginning(context, base, targets, prepared)
        text = prepared if recipe.calibrated and start is None else None
        return prepared, spectra(context, base, targets, text, start), start
    with ThreadPoolExecutor(1) as beside:
        preparing = beside.submit(prepare, context, base, sources)
        decomposed = spectra(context, base, targets, None, None)
        return preparing.result(), decomposed, None


def needed_resources(recipe: Recipe) -> tuple[float, int]:
    """CPU cores and GPUs that the hungriest stage reserves at once, with as few training workers as will do."""
    training = recipe.train.fewest_workers * recipe.train.cpus_per_worker
    workers = max(recipe.train.fewest_workers, recipe.evaluate.workers)
    return max(training, recipe.evaluate.workers, 1), workers if recipe.train.gpu else 0


def _find_inputs(recipe: Recipe) -> tuple[BaseModel, DataSources]:
    # The data first: a wrong path should not wait for a download of the base.
    sources = resolve_sources(recipe.data, recipe.workspace)
    base = find_base(recipe.base, recipe.workspace)
    assert sources is not None
    assert base is not None
    return base, sources


def _beginning(context: RunContext, base: BaseModel, targets: Sequence[Target], prepared: Artifact) -> WarmStart | None:
    recipe = context.recipe
    if recipe.train.start == "scratch":
        return None
    champion = context.registry.champion(recipe.registered_name)
    beginning = decide_warm_start(recipe, champion, base.digest, targets, prepared.key)
    context.bars.say(f"train: from {beginning.start.uri if beginning.start else 'scratch'} ({beginning.reason})")
    return beginning.start


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
