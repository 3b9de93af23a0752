"""Stage 3: base + prepared data + spectra -> trained adapter. Watches the workers' journal; MLflow is told from here."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kasa import KasaConfig
from kasa.targets import Target
from pipeline.artifacts import Artifact
from pipeline.base_model import BaseModel
from pipeline.cluster import Resources, run_training_workers
from pipeline.context import RunContext
from pipeline.deepspeed_config import complete_config, load_deepspeed_config
from pipeline.errors import TrainingError, WorkerError
from pipeline.journal import JournalTail, Record, read_journal, rewrite_journal
from pipeline.keys import train_key
from pipeline.prompting import FILE_NAME as PROMPTING
from pipeline.recipe import Recipe
from pipeline.stages.spectra import FOLDER as SPECTRA
from pipeline.training.worker import ADAPTER, JOURNAL, TrainJob, journalled_error, train_worker

_POLL_S = 0.5


def train(
    context: RunContext, base: BaseModel, targets: Sequence[Target], prepared: Artifact, spectra: Artifact
) -> Artifact:
    """Train the adapter; the artifact holds `adapter/` (loadable, with `prompting.json`) and the journal."""
    recipe = context.recipe
    deepspeed = deepspeed_settings(recipe)

    def make(folder: Path) -> dict[str, Any]:
        job = TrainJob(
            base_name=base.name,
            base_folder=base.folder,
            prepared=prepared.folder.resolve(),
            spectra=(spectra.folder / SPECTRA).resolve(),
            work=folder.resolve(),
            targets=tuple(targets),
            config=adapter_config(recipe),
            settings=recipe.train,
            deepspeed=deepspeed,
        )
        # An error of an earlier run of this command has been read by now, and perhaps mended.
        rewrite_journal(folder / JOURNAL, keep=lambda record: "step" in record)
        with _watching(context, folder / JOURNAL, context.children["train"]):
            run_training_workers(
                train_worker,
                job,
                recipe.train.workers,
                Resources(recipe.train.cpus_per_worker, recipe.train.gpu),
                scratch=folder / "ray_train",
                max_failures=recipe.train.max_failures,
                timeout_s=recipe.train.collective_timeout_s,
            )
        if error := journalled_error(folder / JOURNAL):
            raise TrainingError(error["error"]) if error["mistake"] else WorkerError(error["error"])
        records = read_journal(folder / JOURNAL)
        shutil.copy(prepared.folder / PROMPTING, folder / ADAPTER / PROMPTING)
        shutil.rmtree(job.checkpoints, ignore_errors=True)
        return _facts(records)

    def publish(run_id: str, artifact: Artifact) -> None:
        settings = {"adapter": recipe.adapter.model_dump(mode="json"), "train": recipe.train.model_dump(mode="json")}
        context.tracking.log_parameters(run_id, settings)
        context.log_artifact(run_id, artifact.folder / ADAPTER, "adapter")
        context.log_artifact(run_id, artifact.folder / JOURNAL)

    key = train_key(recipe, prepared.key, spectra.key)
    return context.run_stage(key, make, publish)


def deepspeed_settings(recipe: Recipe) -> dict[str, Any]:
    """The complete DeepSpeed configuration of the recipe.

    Raises:
        RecipeError: there is no such configuration, or it decides what belongs to the recipe.
    """
    return complete_config(load_deepspeed_config(recipe.train.deepspeed), recipe.train)


def adapter_config(recipe: Recipe) -> KasaConfig:
    """The recipe's adapter section in the method library's terms."""
    settings = recipe.adapter
    return KasaConfig(
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        truncation=settings.truncation,
        dropped_rank=recipe.dropped_rank,
        regulariser=settings.regulariser,
        singular_value_weight=settings.singular_value_weight,
        orthogonality_weight=settings.orthogonality_weight,
    )


@contextmanager
def _watching(context: RunContext, journal: Path, run_id: str) -> Iterator[None]:
    """Within the block, show what the journal says and pass it on to MLflow, in a thread of its own."""
    watcher = _Watcher(context, journal, run_id)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_S):
            watcher.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    watcher.look()
    watcher.deliver()


class _Watcher:
    """Follows a training journal. A step is delivered to MLflow once, also when a restart repeats it."""

    def __init__(self, context: RunContext, journal: Path, run_id: str) -> None:
        self._context = context
        self._tail = JournalTail(journal)
        self._run_id = run_id
        self._delivered = context.tracking.last_step(run_id, "loss")
        self._waiting: dict[int, Record] = {}

    def look(self) -> None:
        """Show the newest step; deliver what is new, or keep it for later if the server is away."""
        records = [record for record in self._tail.new_records() if "step" in record]
        if records:
            newest = records[-1]
            note = f"loss {newest['task_loss']:.3f}, {newest['tokens_per_second']:.0f} tokens/s"
            if looks := [record["validation_loss"] for record in records if "validation_loss" in record]:
                note += f", validation {looks[-1]:.3f}"
            self._context.bars.update("train", newest["step"], newest["steps"], note)
        self._waiting |= {record["step"]: record for record in records if record["step"] > self._delivered}
        try:
            self.deliver()
        except Exception:  # whatever the store raises, training goes on and the next look tries again
            time.sleep(_POLL_S)

    def deliver(self) -> None:
        """Send what waits; raises what the store raises."""
        if self._waiting:
            self._context.tracking.log_metric_records(self._run_id, list(self._waiting.values()))
            self._delivered = max(self._waiting)
            self._waiting.clear()


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
