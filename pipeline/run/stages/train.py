"""Stage 4: base + prepared data + spectra -> trained adapter.

While the workers run, what their journals say is shown and delivered to MLflow.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kasa.files import read_json, seal_folder
from pipeline.cluster.workers import Resources, WorkerGroup
from pipeline.config.deepspeed import complete_config, load_deepspeed_config
from pipeline.config.recipe import Recipe
from pipeline.config.settings import TrainSettings
from pipeline.core.console import ProgressBars
from pipeline.core.errors import TrainingError, WorkerError
from pipeline.core.files import ADAPTER, JournalTail, Record, read_journal
from pipeline.core.machine import in_background
from pipeline.methods.choice import check_method, method_of
from pipeline.models.prompting import PROMPTING_FILE, Head
from pipeline.run.context import RunContext
from pipeline.run.stage_runs import Work, log_artifact, log_datasets, run_stage
from pipeline.run.stages.spectra import FOLDER as SPECTRA
from pipeline.run.warm_start import start_adapter
from pipeline.storage.artifacts import Artifact, StageKey
from pipeline.tracking.live_metrics import SYSTEM_SERIES, Delivery, delivering, sampling
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

# A metric of every step, and the journal of the machine's.
CURVE = "loss"
SYSTEM = "system.jsonl"
_POLL_S = 0.5
# A share of the time that is lost to waiting for data.
_WORTH_SAYING = 0.02


@contextmanager
def watching(context: RunContext, folder: Path, run_id: str) -> Iterator[None]:
    """Within the block, show what the journals say and pass it on to MLflow; neither waits for the other."""
    curve = Delivery(context.tracking, run_id, CURVE, context.bars.say)
    system = Delivery(context.tracking, run_id, SYSTEM_SERIES, lambda line: None)
    watcher = _Watcher(context.bars, folder, curve, system)

    def watch(stop: threading.Event) -> None:
        while not stop.wait(_POLL_S):
            watcher.look()
        watcher.look()

    with delivering(curve), delivering(system), sampling(folder / SYSTEM), in_background(watch):
        yield


class _Watcher:
    """Follows the journals of a training."""

    def __init__(self, bars: ProgressBars, folder: Path, curve: Delivery, system: Delivery) -> None:
        self._bars, self._curve, self._system = bars, curve, system
        self._tail = JournalTail(folder / JOURNAL)
        self._system_tail = JournalTail(folder / SYSTEM)
        self._interruptions = [JournalTail(folder / name) for name in (NOTICES, INTERRUPTIONS)]
        self._new_interruptions()  # those of an earlier run of this command have been shown

    def look(self) -> None:
        """Show what is new, and hand it on to be delivered."""
        for record in self._new_interruptions():
            self._bars.say(f"train: {record['interruption']}")
        records = [record for record in self._tail.new_records() if "step" in record]
        if records:
            newest = records[-1]
            self._bars.update("train", newest["step"], newest["steps"], progress_note(records), unit="step")
        self._curve.offer(records)
        self._system.offer(self._system_tail.new_records())

    def _new_interruptions(self) -> list[Record]:
        return [record for tail in self._interruptions for record in tail.new_records()]


def progress_note(records: Sequence[Record]) -> str:
    """The newest of a training's records in a few words."""
    newest = records[-1]
    looks = [f"validation {record['validation_loss']:.3f}" for record in records if "validation_loss" in record]
    waits = (
        [f"{newest['data_wait_share']:.0%} of the time for data"] if newest["data_wait_share"] > _WORTH_SAYING else []
    )
    numbers = [
        f"loss {newest['task_loss']:.3f}",
        *looks[-1:],
        f"{newest['tokens_per_second']:.0f} tokens/s",
        *waits,
        f"{newest['memory_gib']:.1f} GiB",
    ]
    return ", ".join(numbers)


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
    from pipeline.methods.kasa import write_layers  # torch

    folder = job.work
    shutil.copy(prepared.folder / PROMPTING_FILE, folder / ADAPTER / PROMPTING_FILE)
    Head.load(prepared.folder).save(folder / ADAPTER)
    if work.recipe.adapter.spec.registrable:
        write_layers(folder / LAYERS, folder / ADAPTER, spectra.folder / SPECTRA if spectra else None)
    seal_folder(folder / ADAPTER)  # it will be copied to the registry and from there
    attached = read_json(folder / ATTACHED)
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
