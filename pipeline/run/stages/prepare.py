"""Stage 1: data files -> tokenised, prompt-masked, split dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.workers import Resources, run_journalled_tasks
from pipeline.config.recipe import Recipe
from pipeline.config.settings import DataSettings, HeadKind
from pipeline.core.errors import RecipeError
from pipeline.core.files import Record, append_journal
from pipeline.data.prepare import prepare_dataset
from pipeline.data.prepared import load_prepared
from pipeline.data.sources import DataSources
from pipeline.evaluation.results import check_suitable
from pipeline.metrics.catalogue import metrics_for_classes
from pipeline.models.prompting import Head
from pipeline.run.stage_runs import SPLITS, Work, log_artifact, log_datasets, run_stage
from pipeline.storage.artifacts import Artifact, StageKey


@dataclass(frozen=True)
class _Job:
    settings: DataSettings
    sources: DataSources
    tokenizer: Path
    context_tokens: int
    out: Path
    progress: Path
    head: HeadKind


def prepare(work: Work, key: StageKey) -> Artifact:
    """Make the prepared dataset; its facts are the summary of `prepare_dataset`.

    Raises:
        RecipeError: the held-out samples cannot be evaluated as the recipe says.
    """
    context, recipe, base = work.context, work.recipe, work.base

    def make(folder: Path) -> dict[str, Any]:
        progress = folder / "progress.jsonl"
        progress.unlink(missing_ok=True)
        for file in work.sources.files:
            context.storage.upload_input(file.path, file.sha256, file.check_unchanged)
        job = _Job(recipe.data, work.sources, base.folder, base.context_tokens, folder, progress, recipe.base.head)

        def follow(records: Sequence[Record]) -> None:
            for record in records[-1:]:
                context.bars.update("prepare", record["done"], record["total"], "rows")

        (summary,) = run_journalled_tasks(
            context.run_tasks, _prepare_task, [job], Resources(), journals=[progress], follow=follow
        )
        progress.unlink(missing_ok=True)
        for column, place in summary["unread"].items():
            context.bars.say(f"prepare: column {column} is not used (first at {place})")
        return summary

    def publish(run_id: str, artifact: Artifact) -> None:
        rows = {name: float(value) for name, value in artifact.facts.items() if isinstance(value, int)}
        context.tracking.log_parameters(run_id, {"data": recipe.data.model_dump(mode="json")})
        context.tracking.log_metrics(run_id, rows)
        log_datasets(context, run_id, work.sources, artifact, SPLITS)
        log_artifact(context, run_id, artifact.folder, "prepared")

    prepared = run_stage(context, key, make, publish)
    data = load_prepared(prepared.folder)
    if recipe.base.head == "language-model":
        heldout = data.heldout.select_columns(["references", "choices", "choice_labels", "source"])
        check_suitable(recipe.evaluate, heldout, data.summary["form"])
    check_metric(recipe, len(Head.load(prepared.folder).classes))
    return prepared


def check_metric(recipe: Recipe, classes: int) -> None:
    """Before hours of training: whether as many classes as the data turned out to have allow what is to decide.

    Raises:
        RecipeError: they do not.
    """
    evaluate = recipe.evaluate
    meaningful = metrics_for_classes(evaluate.measured, classes)
    for metric in (evaluate.gate_metric, *recipe.promotion.guards):
        if metric not in meaningful:
            raise RecipeError(
                f"{metric} is the score of one of two classes, and the data has {classes}; use f1_macro in "
                "evaluate.metric and promotion.guards"
            )


def _prepare_task(job: _Job) -> dict[str, Any]:
    def on_progress(done: int, total: int) -> None:
        append_journal(job.progress, [{"done": done, "total": total}])

    return prepare_dataset(job.settings, job.sources, job.tokenizer, job.context_tokens, job.out, on_progress, job.head)
