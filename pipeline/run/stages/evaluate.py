"""Stage 5: base, adapted model and champion on the same held-out samples, with the same measures.

Each candidate's result is an artifact of its own: the base is evaluated once for all adapters, the champion not again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kasa.errors import DamagedFileError
from kasa.files import read_json
from pipeline.cluster.workers import Resources, counting, run_journalled_tasks
from pipeline.core.errors import WorkspaceError
from pipeline.core.files import ADAPTER, Record, atomic_write, read_journal
from pipeline.data.prepared import load_prepared
from pipeline.evaluation.results import (
    HARNESS_JSON,
    HarnessRow,
    harness_rows,
    read_harness,
    read_samples,
    write_samples,
)
from pipeline.metrics.catalogue import metrics_for_classes
from pipeline.metrics.intervals import Interval, measure, paired_differences
from pipeline.models.prompting import Head
from pipeline.registry.aliases import finish_interrupted_change
from pipeline.registry.store import ModelVersion
from pipeline.run.context import RunContext
from pipeline.run.dependencies import KeyInputs
from pipeline.run.graph import EVALUATE, PREPARE, STAGE, TRAIN, stage_key
from pipeline.run.stage_runs import Work, log_artifact, log_datasets, open_stage
from pipeline.storage.artifacts import Artifact, StageKey

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


def evaluate(work: Work, key: StageKey, prepared: Artifact, adapter: Artifact | None = None) -> Artifact | Evaluation:
    """Evaluate the trained adapter, or the plain base where there is none; a whole run, beside the base and the champion."""
    if not work.inputs.registers:
        return _evaluate_alone(work, key, prepared, adapter)
    assert adapter is not None
    return _evaluate_beside(work, key, prepared, adapter)


def _evaluate_beside(work: Work, key: StageKey, prepared: Artifact, trained: Artifact) -> Evaluation:
    """Evaluate the base, the trained adapter, and the champion if it is another adapter on the same base."""
    context = work.context
    adapted = Candidate("adapted", trained.folder / ADAPTER, trained.key)
    measured = _measured(work, prepared)
    champion, rival, obstacle = _champion(work, trained, load_prepared(prepared.folder).head)
    candidates = [Candidate("base", None, None), *([rival] if rival else []), adapted]
    results: dict[str, Artifact] = {}
    with open_stage(context, key.stage) as stage:
        for candidate in candidates:
            make = partial(_measure, work, prepared, candidate, measured)
            if candidate is adapted:
                results[candidate.name] = stage.main_artifact(key, make)
            else:
                results[candidate.name] = stage.artifact(_key_of(work.inputs, prepared, candidate), make)
        evaluation = _compare(results, measured, champion, obstacle)
        log_datasets(context, stage.run_id, work.sources, prepared, ["heldout"])
        _publish(context, stage.run_id, evaluation, results)
    return evaluation


def _key_of(inputs: KeyInputs, prepared: Artifact, candidate: Candidate) -> StageKey:
    """The key of a candidate's result, which is the same whatever training it is compared with."""
    made = {PREPARE: prepared.key} | ({TRAIN: candidate.key} if candidate.key else {})
    return stage_key(STAGE[EVALUATE], replace(inputs, trains=candidate.key is not None), made)


def _evaluate_alone(work: Work, key: StageKey, prepared: Artifact, trained: Artifact | None) -> Artifact:
    """Evaluate one model, against none: the base where `trained` is None."""
    context = work.context
    candidate = (
        Candidate("adapted", trained.folder / ADAPTER, trained.key) if trained else Candidate("base", None, None)
    )
    with open_stage(context, key.stage) as stage:
        measured = _measured(work, prepared)
        artifact = stage.main_artifact(key, partial(_measure, work, prepared, candidate, measured))
        context.tracking.log_metrics(stage.run_id, artifact.facts["metrics"])
        log_artifact(context, stage.run_id, artifact.folder / RESULTS)
    return artifact


def results_of(artifact: Artifact) -> list[Record]:
    """The per-sample results of an evaluation, in the order of the held-out split."""
    return read_samples(artifact.folder / RESULTS)


def _measured(work: Work, prepared: Artifact) -> tuple[str, ...]:
    """The metrics that the held-out samples allow."""
    return metrics_for_classes(work.recipe.evaluate.measured, len(load_prepared(prepared.folder).head.classes))


def _champion(work: Work, trained: Artifact, head: Head) -> tuple[ModelVersion | None, Candidate | None, str | None]:
    """The champion, and itself as a candidate or what prevents that."""
    context = work.context
    name = work.recipe.registered_name
    finish_interrupted_change(context.registry, name)
    champion = context.registry.champion(name)
    if champion is None:
        return None, None, None
    key, who = champion.tags.get(_TRAIN_KEY), f"the champion, version {champion.version},"
    if key == trained.key:
        return champion, None, f"{who} holds this very adapter"
    if key is None or champion.tags.get("kasa.base_digest") != work.base.digest:
        what = "was not registered by this pipeline" if key is None else "belongs to another base"
        return champion, None, f"{who} {what} and cannot be compared; kasa promote can replace it by hand"
    adapter = context.registered_adapter(champion.uri, key)
    if Head.load(adapter) != head:
        obstacle = "has another head, or other classes, and cannot be compared; kasa promote can replace it by hand"
        return champion, None, f"{who} {obstacle}"
    return champion, Candidate("champion", adapter, key), None


def _measure(
    work: Work, prepared: Artifact, candidate: Candidate, metrics: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Score all held-out samples, shared out over the evaluation workers; facts: the metrics."""
    journals = _score(work, prepared, candidate, folder)
    _run_harness(work, candidate, folder)
    results = sorted((result for journal in journals for result in read_journal(journal)), key=lambda r: r["sample"])
    rows = load_prepared(prepared.folder).summary["heldout_rows"]
    if [result["sample"] for result in results] != list(range(rows)):
        raise WorkspaceError(
            f"{folder} has whole records of {len(results)} of {rows} samples; run the same command again, which evaluates "
            "the others"
        )
    asked = load_prepared(prepared.folder).heldout.select_columns(["source", "prompt"])
    write_samples(folder / RESULTS, [{**asked[result["sample"]], **result} for result in results])
    for journal in journals:
        journal.unlink()
    found = measure(results, metrics)
    return {
        "candidate": candidate.name,
        "rows": len(results),
        "metrics": {name: interval.estimate for name, interval in found.items()},
        "intervals": {name: [interval.low, interval.high] for name, interval in found.items()},
    }


def _score(work: Work, prepared: Artifact, candidate: Candidate, folder: Path) -> list[Path]:
    """The journals with the results of all samples."""
    from pipeline.evaluation.worker import EvaluationShard, evaluate_shard  # torch

    context, recipe = work.context, work.recipe
    shards = [
        EvaluationShard(
            base_folder=work.base.folder,
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
    journals = [shard.journal for shard in shards]
    run_journalled_tasks(
        context.run_tasks,
        evaluate_shard,
        shards,
        Resources(1, recipe.train.gpu),
        journals=journals,
        follow=counting(context.bars, f"evaluate {candidate.name}", rows, "samples"),
    )
    return journals


def _run_harness(work: Work, candidate: Candidate, folder: Path) -> None:
    """Run the tasks of lm-evaluation-harness, those that an earlier run of this command has not finished."""
    context, evaluate = work.context, work.recipe.evaluate
    if not evaluate.harness.tasks:
        return
    from pipeline.evaluation.harness import HarnessJob, run_harness  # torch

    places = {task: folder / "harness" / f"{index}.json" for index, task in enumerate(evaluate.harness.tasks)}
    jobs = [
        HarnessJob(
            base_folder=work.base.folder,
            adapter=candidate.adapter.resolve() if candidate.adapter else None,
            precision=work.recipe.train.precision,
            task=task,
            settings=evaluate.harness.model_copy(update={"include": _whole_path(evaluate.harness.include)}),
            batch_size=evaluate.batch_size,
            out=place.resolve(),
        )
        for task, place in places.items()
        if not _is_whole(place)
    ]
    count = counting(context.bars, f"harness {candidate.name}", len(places), "tasks")
    count([{}] * (len(places) - len(jobs)))
    context.run_tasks(run_harness, jobs, Resources(1, work.recipe.train.gpu), on_result=lambda job, result: count([{}]))
    results = [row for place in places.values() for row in read_json(place, list)]
    atomic_write(folder / HARNESS_JSON, json.dumps(results))
    shutil.rmtree(folder / "harness")


def _is_whole(results: Path) -> bool:
    try:
        read_json(results, list)
    except (FileNotFoundError, DamagedFileError):
        return False
    return True


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
        log_artifact(context, run_id, artifact.folder / RESULTS, name)
        if (artifact.folder / HARNESS_JSON).exists():
            log_artifact(context, run_id, artifact.folder / HARNESS_JSON, name)
