"""Stage 5: base, adapted model and champion on the same held-out samples, with the same measures.

Each candidate's result is an artifact of its own: the base is evaluated once for all adapters, the champion not again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artifacts.store import ADAPTER, Artifact
from pipeline.cluster.workers import Resources
from pipeline.core.files import atomic_write
from pipeline.core.journal import JournalTail, Record, read_journal
from pipeline.data.prepared import load_prepared
from pipeline.data.sources import DataSources
from pipeline.evaluation.results import (
    HARNESS_JSON,
    HarnessRow,
    harness_rows,
    read_harness,
    read_samples,
    write_samples,
)
from pipeline.metrics.intervals import Interval, measure, paired_differences
from pipeline.metrics.scores import metrics_for_classes
from pipeline.models.base import BaseModel
from pipeline.models.heads import Head
from pipeline.registry.alias_changes import finish_interrupted_change
from pipeline.registry.store import ModelVersion
from pipeline.run.context import RunContext
from pipeline.run.graph import EVALUATE, evaluation_key
from pipeline.run.stages.prepare import log_datasets

RESULTS = "samples.parquet"
_TRAIN_KEY = "kasa.train_key"


@dataclass(frozen=True)
class Candidate:
    """A model to be evaluated: the base, alone or with an adapter; `key` identifies the adapter."""

    name: str
    adapter: Path | None
    key: str | None


@dataclass(frozen=True)
class Evaluation:
    """All candidates side by side.

    Attributes:
        artifact: the adapted model's own result.
        metrics: candidate -> metric -> value.
        intervals: candidate -> metric -> both ends of the value's own 95% interval.
        differences: opponent (`base`, `champion`) -> metric -> adapted - opponent, paired, with interval.
        samples: candidate -> per-sample results, in the order of the held-out split.
        champion: the champion there was.
        obstacle: why the champion could not be evaluated, if so.
    """

    artifact: Artifact
    metrics: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, list[float]]]
    differences: dict[str, dict[str, Interval]]
    samples: dict[str, list[Record]]
    harness: list[HarnessRow]
    champion: ModelVersion | None
    obstacle: str | None

    @property
    def champion_version(self) -> str | None:
        """The number of the champion there was."""
        return self.champion.version if self.champion else None


def evaluate(
    context: RunContext, base: BaseModel, sources: DataSources, prepared: Artifact, trained: Artifact
) -> Evaluation:
    """Evaluate the base, the trained adapter, and the champion if it is another adapter on the same base."""
    adapted = Candidate("adapted", trained.folder / ADAPTER, trained.key)
    measured = _measured(context, prepared)
    champion, rival, obstacle = _champion(context, base, trained, load_prepared(prepared.folder).head)
    candidates = [Candidate("base", None, None), *([rival] if rival else []), adapted]
    results: dict[str, Artifact] = {}
    with context.stage(EVALUATE) as stage:
        for candidate in candidates:
            key = evaluation_key(context.recipe, prepared.key, base.digest, candidate.key)
            find_or_make = stage.main_artifact if candidate is adapted else stage.artifact
            results[candidate.name] = find_or_make(key, partial(_measure, context, base, prepared, candidate, measured))
        evaluation = _compare(results, measured, champion, obstacle)
        log_datasets(context, stage.run_id, sources, prepared, ["heldout"])
        _publish(context, stage.run_id, evaluation, results)
    return evaluation


def evaluate_alone(context: RunContext, base: BaseModel, prepared: Artifact, trained: Artifact | None) -> Artifact:
    """Evaluate one model, against none: the base where `trained` is None."""
    name = "adapted" if trained else "base"
    candidate = Candidate(name, trained.folder / ADAPTER if trained else None, trained.key if trained else None)
    with context.stage(EVALUATE) as stage:
        key = evaluation_key(context.recipe, prepared.key, base.digest, candidate.key)
        measured = _measured(context, prepared)
        artifact = stage.main_artifact(key, partial(_measure, context, base, prepared, candidate, measured))
        context.tracking.log_metrics(stage.run_id, artifact.facts["metrics"])
        context.log_artifact(stage.run_id, artifact.folder / RESULTS)
    return artifact


def results_of(artifact: Artifact) -> list[Record]:
    """The per-sample results of an evaluation, in the order of the held-out split."""
    return read_samples(artifact.folder / RESULTS)


def _measured(context: RunContext, prepared: Artifact) -> tuple[str, ...]:
    """The metrics that the held-out samples allow."""
    return metrics_for_classes(context.recipe.evaluate.measured, len(load_prepared(prepared.folder).head.classes))


def _champion(
    context: RunContext, base: BaseModel, trained: Artifact, head: Head
) -> tuple[ModelVersion | None, Candidate | None, str | None]:
    """The champion, and itself as a candidate or what prevents that."""
    name = context.recipe.registered_name
    finish_interrupted_change(context.registry, name)
    champion = context.registry.champion(name)
    if champion is None:
        return None, None, None
    key, who = champion.tags.get(_TRAIN_KEY), f"the champion, version {champion.version},"
    if key == trained.key:
        return champion, None, f"{who} holds this very adapter"
    if key is None or champion.tags.get("kasa.base_digest") != base.digest:
        what = "was not registered by this pipeline" if key is None else "belongs to another base"
        return champion, None, f"{who} {what} and cannot be compared; kasa promote can replace it by hand"
    adapter = context.registered_adapter(champion.uri, key)
    if Head.load(adapter) != head:
        obstacle = "has another head, or other classes, and cannot be compared; kasa promote can replace it by hand"
        return champion, None, f"{who} {obstacle}"
    return champion, Candidate("champion", adapter, key), None


def _measure(
    context: RunContext,
    base: BaseModel,
    prepared: Artifact,
    candidate: Candidate,
    metrics: Sequence[str],
    folder: Path,
) -> dict[str, Any]:
    """Score all held-out samples, shared out over the evaluation workers; facts: the metrics."""
    from pipeline.evaluation.worker import EvaluationShard, evaluate_shard  # torch

    recipe = context.recipe
    shards = [
        EvaluationShard(
            base_folder=base.folder,
            adapter=candidate.adapter.resolve() if candidate.adapter else None,
            prepared=prepared.folder.resolve(),
            precision=recipe.train.precision,
            settings=recipe.evaluate,
            index=index,
            count=recipe.evaluate.workers,
            journal=(folder / f"shard-{index}-of-{recipe.evaluate.workers}.jsonl").resolve(),
            seed=recipe.train.seed,
        )
        for index in range(recipe.evaluate.workers)
    ]
    rows = load_prepared(prepared.folder).summary["heldout_rows"]
    tails = [JournalTail(shard.journal) for shard in shards]
    done = 0

    def show() -> None:
        nonlocal done
        done += sum(len(tail.new_records()) for tail in tails)
        context.bars.update(f"evaluate {candidate.name}", min(done, rows), rows, "samples")

    context.run_tasks(evaluate_shard, shards, Resources(1, recipe.train.gpu), while_waiting=show)
    show()
    _run_harness(context, base, candidate, folder)
    results = sorted((r for shard in shards for r in read_journal(shard.journal)), key=lambda r: r["sample"])
    asked = load_prepared(prepared.folder).heldout.select_columns(["source", "prompt"])
    write_samples(folder / RESULTS, [{**asked[result["sample"]], **result} for result in results])
    for shard in shards:
        shard.journal.unlink()
    found = measure(results, metrics)
    return {
        "candidate": candidate.name,
        "rows": len(results),
        "metrics": {name: interval.estimate for name, interval in found.items()},
        "intervals": {name: [interval.low, interval.high] for name, interval in found.items()},
    }


def _run_harness(context: RunContext, base: BaseModel, candidate: Candidate, folder: Path) -> None:
    """Run the tasks of lm-evaluation-harness, those that an earlier run of this command has not finished."""
    evaluate = context.recipe.evaluate
    if not evaluate.harness.tasks:
        return
    from pipeline.evaluation.harness import HarnessJob, run_harness  # torch

    places = {task: folder / "harness" / f"{index}.json" for index, task in enumerate(evaluate.harness.tasks)}
    jobs = [
        HarnessJob(
            base_folder=base.folder,
            adapter=candidate.adapter.resolve() if candidate.adapter else None,
            precision=context.recipe.train.precision,
            task=task,
            settings=evaluate.harness.model_copy(update={"include": _whole_path(evaluate.harness.include)}),
            batch_size=evaluate.batch_size,
            out=place.resolve(),
        )
        for task, place in places.items()
        if not place.exists()
    ]

    def show(*result: object) -> None:
        done = sum(place.exists() for place in places.values())
        context.bars.update(f"harness {candidate.name}", done, len(places), "tasks")

    show()
    context.run_tasks(run_harness, jobs, Resources(1, context.recipe.train.gpu), on_result=show)
    results = [row for place in places.values() for row in json.loads(place.read_text(encoding="utf-8"))]
    atomic_write(folder / HARNESS_JSON, json.dumps(results))
    shutil.rmtree(folder / "harness")


def _whole_path(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def _compare(
    results: Mapping[str, Artifact], metrics: Sequence[str], champion: ModelVersion | None, obstacle: str | None
) -> Evaluation:
    samples = {name: results_of(artifact) for name, artifact in results.items()}
    return Evaluation(
        artifact=results["adapted"],
        metrics={name: artifact.facts["metrics"] for name, artifact in results.items()},
        intervals={name: artifact.facts["intervals"] for name, artifact in results.items()},
        differences={
            name: paired_differences(samples["adapted"], samples[name], metrics)
            for name in results
            if name != "adapted"
        },
        samples=samples,
        harness=harness_rows({name: read_harness(artifact.folder) for name, artifact in results.items()}),
        champion=champion,
        obstacle=obstacle,
    )


def _publish(context: RunContext, run_id: str, evaluation: Evaluation, results: Mapping[str, Artifact]) -> None:
    context.tracking.log_parameters(run_id, {"evaluate": context.recipe.evaluate.model_dump(mode="json")})
    for name, metrics in evaluation.metrics.items():
        context.tracking.log_metrics(run_id, {f"{name}.{metric}": value for metric, value in metrics.items()})
    for row in evaluation.harness:
        context.tracking.log_metrics(
            run_id, {f"{name}.harness/{row.name}": value for name, value in row.values.items()}
        )
    for name, artifact in results.items():
        context.log_artifact(run_id, artifact.folder / RESULTS, name)
        if (artifact.folder / HARNESS_JSON).exists():
            context.log_artifact(run_id, artifact.folder / HARNESS_JSON, name)
