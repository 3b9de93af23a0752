"""A run from its recipe to its report, for reading first.

    base + data ── prepare ── spectra ── audit ── train ── evaluate ── register ── report

The graph (`pipeline.run.graph`) says of each stage what it is made from and what runs in it; `pipeline.run.stages` holds
what each does. Every stage is content-addressed, so what is unchanged is reused, and each is an MLflow run under the run's
parent. Spectra look at the training text, unless `adapter.truncation` says otherwise; then they depend on the base alone
and are made beside the data. Training starts with a new adapter, or with the champion's (`pipeline.run.warm_start`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kasa.targets import Target
from pipeline.cluster.connection import ray_cluster
from pipeline.config.recipe import Recipe
from pipeline.core.code import code_tags
from pipeline.core.console import ProgressBars
from pipeline.data.first_rows import check_first_rows
from pipeline.data.sources import DataSources, resolve_sources
from pipeline.methods.choice import check_ranks
from pipeline.models.base import BaseModel, find_base
from pipeline.run.context import (
    RunContext,
    alone,
    close_context,
    open_context,
    ready_workspace,
    recipe_digest,
    seed_tags,
)
from pipeline.run.dependencies import REGISTER, KeyInputs
from pipeline.run.graph import EVALUATE, STAGES, needed_resources
from pipeline.run.preflight import check_before_work, check_lengths
from pipeline.run.report_facts import environment_tags, use_commands, write_report
from pipeline.run.stage_runs import Work, run_stages
from pipeline.run.stages.evaluate import Evaluation
from pipeline.run.stages.register import Registration
from pipeline.run.warm_start import WarmStart, decide_warm_start, starting_from
from pipeline.tracking.server import registry_identity


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
    recipe: Recipe, bars: ProgressBars, recompute: Iterable[str] = (), confirm: Callable[[], None] = lambda: None
) -> RunResult:
    """Run the recipe to its end, resuming whatever an earlier run of it left.

    Args:
        recompute: stages that make their artifacts again, though they are there.
        confirm: raises where this process may not go on; asked before each stage and before the registry is changed.

    Raises:
        KasaError: a mistake in the recipe, the data, the base or the environment; what was made so far is kept.
    """
    started = time.perf_counter()
    # Mistakes in what later stages need should not wait for them.
    check_before_work(recipe).require()
    storage = ready_workspace(recipe)
    base, sources = _find_inputs(recipe)
    targets = base.targets(recipe.adapter.targets)
    check_ranks(recipe, targets)
    check_lengths(recipe, base.context_tokens)

    # Two at once would resume each other's MLflow runs; the second finds what the first has made.
    with alone(storage, recipe_digest(recipe), "a run of this recipe"):
        storage.upload_input(base.folder, base.digest, base.check_unchanged)
        tags = {**environment_tags(), **code_tags(), **seed_tags(recipe)}
        context = open_context(recipe, storage, bars, tags, recompute, confirm)
        return _run_stages(context, base, sources, targets, started)


def _run_stages(
    context: RunContext, base: BaseModel, sources: DataSources, targets: Sequence[Target], started: float
) -> RunResult:
    recipe, bars = context.recipe, context.bars
    registry = registry_identity(recipe.workspace)
    inputs = KeyInputs(recipe, base.digest, sources.digest, targets, registry, base_drops=base.drops)
    with (
        context.tracking.open_run(context.parent_run),
        ray_cluster(recipe.workspace, *needed_resources(recipe), on_connected=context.describe_cluster),
        bars.showing(),
    ):
        context.describe_run()
        for remark in base.remarks:
            bars.say(f"base: {remark}")
        start = _warm_start(context, inputs)
        work = Work(context, base, sources, starting_from(inputs, start, context.store, context.recomputed), start)
        results = run_stages(work)
        report = write_report(context, work.made, results[EVALUATE], results[REGISTER])
    close_context(context)
    return _result(work, results, report, time.perf_counter() - started)


def _find_inputs(recipe: Recipe) -> tuple[BaseModel, DataSources]:
    # The data first: a wrong path should not wait for a download of the base.
    sources = resolve_sources(recipe.data, recipe.workspace)
    assert sources is not None
    check_first_rows(recipe.data, sources.sides, recipe.base.head)
    base = find_base(recipe.base, recipe.workspace)
    assert base is not None
    return base, sources


def _warm_start(context: RunContext, inputs: KeyInputs) -> WarmStart | None:
    """The adapter that training starts from, where the recipe asks for one and there is one that fits."""
    if context.recipe.train.start == "scratch":
        return None
    champion = context.registry.champion(context.recipe.registered_name)
    decision = decide_warm_start(inputs, champion)
    context.bars.say(f"train: from {decision.start.uri if decision.start else 'scratch'} ({decision.reason})")
    return decision.start


def _result(work: Work, results: Mapping[str, Any], report: Path, seconds: float) -> RunResult:
    context = work.context
    stages = {facts.name: facts for facts in context.finished}
    order = [name for name in STAGES if name in stages]
    return RunResult(
        parent_run=context.parent_run,
        stage_runs={name: stages[name].mlflow_run_id for name in order},
        stage_seconds={name: stages[name].seconds for name in order},
        stage_status={name: stages[name].status for name in order},
        artifacts={name: artifact.folder for name, artifact in work.made.items() if name != REGISTER},
        evaluation=results[EVALUATE],
        registration=results[REGISTER],
        report=report,
        commands=use_commands(context, results[REGISTER]),
        seconds=seconds,
    )
