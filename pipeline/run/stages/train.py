"""Stage 4: base + prepared data + spectra -> trained adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.store import Artifact, StageKey
from pipeline.cluster.workers import Resources, WorkerGroup
from pipeline.config.deepspeed import complete_config, load_deepspeed_config
from pipeline.config.recipe import Recipe
from pipeline.config.training import TrainSettings
from pipeline.core.errors import TrainingError, WorkerError
from pipeline.core.files import ADAPTER
from pipeline.core.journal import Record, read_journal
from pipeline.methods.choice import check_method, method_of
from pipeline.models.heads import Head
from pipeline.models.prompting import FILE_NAME as PROMPTING
from pipeline.run.stage_runs import log_artifact, log_datasets, run_stage
from pipeline.run.stages.spectra import FOLDER as SPECTRA
from pipeline.run.training_watch import CURVE, SYSTEM, watching
from pipeline.run.warm_start import start_adapter
from pipeline.run.work import Work
from pipeline.tracking.live_metrics import SYSTEM_SERIES
from pipeline.training.job import (
    ATTACHED,
    ERRORS,
    INTERRUPTIONS,
    JOURNAL,
    LAYERS,
    NOTICES,
    ROLL_CALL,
    TrainJob,
    journalled_error,
)


def train(work: Work, key: StageKey, prepared: Artifact, spectra: Artifact | None = None) -> Artifact:
    """Train the adapter, a new one or on from `work.start`; the artifact holds `adapter/` (loadable, with
    `prompting.json`) and the journal.

    Args:
        spectra: None where the method starts without any.
    """
    context, recipe = work.context, work.recipe
    deepspeed = deepspeed_settings(recipe)

    def make(folder: Path) -> dict[str, Any]:
        from pipeline.training.worker import train_worker  # DeepSpeed

        job = _job(work, folder, deepspeed, prepared, spectra)
        # An error of an earlier run of this command has been read by now, and perhaps mended.
        shutil.rmtree(folder / ERRORS, ignore_errors=True)
        with watching(context, folder, context.children[key.stage]):
            context.run_training_workers(
                train_worker, job, _worker_group(recipe.train), folder / "ray_train", folder / INTERRUPTIONS
            )
        if error := journalled_error(folder):
            raise TrainingError(error["error"]) if error["mistake"] else WorkerError(error["error"])
        return _finished(work, job, prepared, spectra)

    def publish(run_id: str, artifact: Artifact) -> None:
        settings = {"adapter": recipe.adapter.model_dump(mode="json"), "train": recipe.train.model_dump(mode="json")}
        context.tracking.tag(run_id, {"kasa.started_from": artifact.facts["start"]})
        context.tracking.log_parameters(run_id, settings)
        log_datasets(context, run_id, work.sources, prepared, ["train"])
        # What a server that was away has not got yet.
        context.tracking.deliver(run_id, CURVE, read_journal(artifact.folder / JOURNAL))
        context.tracking.deliver(run_id, SYSTEM_SERIES, read_journal(artifact.folder / SYSTEM))
        log_artifact(context, run_id, artifact.folder / ADAPTER, "adapter")
        log_artifact(context, run_id, artifact.folder / JOURNAL)

    return run_stage(context, key, make, publish)


def _job(work: Work, folder: Path, deepspeed: dict[str, Any], prepared: Artifact, spectra: Artifact | None) -> TrainJob:
    method = method_of(
        work.recipe,
        work.base,
        work.inputs.targets,
        (spectra.folder / SPECTRA).resolve() if spectra else None,
        start_adapter(work.context, work.start) if work.start else None,
    )
    return TrainJob(
        base_folder=work.base.folder,
        prepared=prepared.folder.resolve(),
        work=folder.resolve(),
        method=method,
        settings=work.recipe.train,
        deepspeed=deepspeed,
    )


def _finished(work: Work, job: TrainJob, prepared: Artifact, spectra: Artifact | None) -> dict[str, Any]:
    """Complete the artifact of a training that has come to its end; the facts about it."""
    from pipeline.training.layers import write_layers  # torch

    folder = job.work
    shutil.copy(prepared.folder / PROMPTING, folder / ADAPTER / PROMPTING)
    Head.load(prepared.folder).save(folder / ADAPTER)
    if spectra and work.recipe.adapter.spec.components == "dropped":
        write_layers(folder / LAYERS, folder / ADAPTER, spectra.folder / SPECTRA)
    attached = json.loads((folder / ATTACHED).read_text(encoding="utf-8"))
    for finished_with in (job.checkpoints, folder / ROLL_CALL, folder / ERRORS):
        shutil.rmtree(finished_with, ignore_errors=True)
    return _facts(read_journal(folder / JOURNAL)) | {
        **attached,
        "adapter_bytes": sum(file.stat().st_size for file in (folder / ADAPTER).glob("*.safetensors")),
        "start": work.start.uri if work.start else "scratch",
        "interruptions": [
            one["interruption"] for name in (NOTICES, INTERRUPTIONS) for one in read_journal(folder / name)
        ],
    }


def deepspeed_settings(recipe: Recipe) -> dict[str, Any]:
    """The complete DeepSpeed configuration of the recipe.

    Raises:
        RecipeError: there is no such configuration, it decides what belongs to the recipe, or the method cannot do with it.
    """
    config = complete_config(load_deepspeed_config(recipe.train.deepspeed), recipe.train)
    check_method(recipe, config)
    return config


def _worker_group(settings: TrainSettings) -> WorkerGroup:
    return WorkerGroup(
        most=settings.workers,
        fewest=settings.fewest_workers,
        resources=Resources(settings.cpus_per_worker, settings.gpu),
        max_failures=settings.max_failures,
        timeout_s=settings.collective_timeout_s,
    )


def _facts(records: Sequence[Record]) -> dict[str, Any]:
    # The first steps pay for warm-up of caches and allocators.
    speeds = sorted(record["tokens_per_second"] for record in records[2:] or records)
    last = records[-1]
    looks = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    best = min(looks, key=lambda step: (looks[step], step), default=None)
    return {
        **({} if best is None else {"best_step": best, "validation_loss": looks[best]}),
        "steps": last["step"],
        "final_loss": last["task_loss"],
        "tokens_per_second": speeds[len(speeds) // 2],
        "memory_gib": max(record["memory_gib"] for record in records),
    }
