"""What each training process runs. One process is world size 1 of the same code.

Rank 0 alone writes: the journal (one record per step), the checkpoints, and at the end the adapter. The driver reads the
journal; nothing here knows of Ray or MLflow. After a collective operation has timed out, every rank that waited answers by a
file: a rank that hangs does not answer, so it is the one to name in the error.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kasa.errors import KasaError
from kasa.targets import is_within
from pipeline.config.deepspeed import with_accumulation
from pipeline.config.settings import TrainSettings
from pipeline.core.errors import TrainingError, WorkerError
from pipeline.core.files import ADAPTER, JournalWriter, append_journal, read_journal
from pipeline.data.prepared import label_counts, load_prepared, token_counts
from pipeline.methods.method import Adapted
from pipeline.models.loading import load_base
from pipeline.models.prompting import Head, head_modules
from pipeline.training import zero
from pipeline.training.job import (
    ATTACHED,
    ERRORS,
    JOURNAL,
    NOTICES,
    ROLL_CALL,
    BatchPlan,
    TrainJob,
    journalled_error,
    learning_rate,
    optimizer_steps,
)
from pipeline.training.step import (
    Objective,
    ValidationHistory,
    divergence,
    objective_of,
    optimizer_step,
    validation_loss,
)
from pipeline.training.zero import (
    Checkpoint,
    load_checkpoint,
    newest_sound_checkpoint,
    newest_step,
    save_checkpoint,
)

# The ranks time out within seconds of one another.
_ANSWER_TIMEOUT_S = 10.0

_TIMED_OUT = re.compile("timed out|timeout", re.IGNORECASE)


class HangDetector:
    """The answers of all ranks of one attempt, as files in a folder.

    From the start `RANK.process` holds the process id and host of each rank, for a person who wants to inspect one that is
    stuck.
    """

    def __init__(self, folder: Path) -> None:
        """Begin with an empty `folder`, which all ranks can see; collective, before training."""
        self._folder = folder
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        if self._rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        folder.mkdir(parents=True, exist_ok=True)  # a node without rank 0 may have a disk of its own
        self._process_file(self._rank).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    def raise_for_missing_ranks(self, timeout: BaseException) -> None:
        """Answer after a time-out, and wait for the answers of the others.

        Args:
            timeout: the error of the collective operation.

        Raises:
            WorkerError: some ranks do not answer; it names them by number and process.
        """
        (self._folder / str(self._rank)).touch()
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while missing := self._missing_ranks():
            if time.monotonic() > deadline:
                workers = ", ".join(f"{rank}{self._process_of(rank)}" for rank in missing)
                raise WorkerError(
                    f"training worker {workers} hangs: the others waited for it as long as train.collective_timeout_s"
                    " allows"
                ) from timeout
            time.sleep(0.1)

    def _missing_ranks(self) -> list[int]:
        return [rank for rank in range(self._world) if not (self._folder / str(rank)).exists()]

    def _process_of(self, rank: int) -> str:
        file = self._process_file(rank)
        return f" ({file.read_text(encoding='utf-8')})" if file.exists() else ""

    def _process_file(self, rank: int) -> Path:
        return self._folder / f"{rank}.process"


def train_worker(job: TrainJob, node_leaves: Callable[[], bool] = lambda: False) -> None:
    """Train from the newest checkpoint to the end; torch's process group must exist.

    Any error that is raised here is retried by Ray Train, as if the process had died. That is right for lost peers and full
    memory, which torch reports as RuntimeError. Any other error would only occur again: it is written to the journal, where
    the next attempt finds it and ends at once.

    Args:
        job: what to train.
        node_leaves: says whether the node of this process is about to be taken away. Once it does on any rank, a checkpoint
            is saved at once.

    Raises:
        WorkerError: another rank hangs.
        Exception: training failed.
    """
    if journalled_error(job.work):
        return
    _silence_libraries()
    torch.set_num_threads(max(1, int(job.settings.cpus_per_worker)))
    hang_detector = HangDetector(job.work / ROLL_CALL)
    try:
        training = _start(job)
        training.run(node_leaves)
        training.save_adapter()
    except (RuntimeError, ConnectionError, MemoryError) as error:
        if _TIMED_OUT.search(str(error)):
            hang_detector.raise_for_missing_ranks(error)
        raise
    except Exception as error:
        if not dist.is_initialized():
            raise  # not an error of its own: Ray Train ends the workers because a node leaves or others join
        mistake = isinstance(error, KasaError)
        text = str(error) if mistake else f"{type(error).__name__}: {error}"
        errors = job.work / ERRORS
        errors.mkdir(exist_ok=True)
        append_journal(errors / f"{dist.get_rank()}.jsonl", [{"error": text, "mistake": mistake}])
        raise


@dataclass
class _Training:
    """A training in progress, as one rank sees it.

    Attributes:
        job: what to train.
        plan: which samples each step has.
        samples: the training samples.
        validation: the validation samples, if any.
        objective: what is minimised.
        adapted: the base with the method in it.
        engine: the DeepSpeed engine of it.
        step: optimizer steps done.
        journal: of rank 0; None on the others.
        history: the validation losses so far.
    """

    job: TrainJob
    plan: BatchPlan
    samples: Any
    validation: Any
    objective: Objective
    adapted: Adapted
    engine: Any
    step: int
    journal: JournalWriter | None
    history: ValidationHistory

    def run(self, node_leaves: Callable[[], bool]) -> None:
        """Train to the last step, or until validation stops it, and save checkpoints on the way."""
        noticed = False
        while self.step < self.plan.steps and not self.history.should_stop:
            self._advance()
            due = self.step % self.job.settings.checkpoint_every == 0 or self.step == self.history.best_step
            if not noticed and _any_rank(node_leaves(), self.engine.device):
                noticed = due = True
                if self.journal:
                    notice = f"a node is about to be taken away; the state after step {self.step} is saved"
                    append_journal(self.job.work / NOTICES, [{"interruption": notice}])
            if due and self.step < self.plan.steps:
                self._save_checkpoint()

    def save_adapter(self) -> None:
        """Write the adapter of the best validated step, or of the last; collective."""
        values = zero.whole_parameters(self.engine, self.adapted.parameters)
        if dist.get_rank() == 0:
            best = self.history.best_step
            if best not in (None, self.step):
                values = load_checkpoint(self.job.checkpoints, best).values
            self.adapted.save(self.job.work / ADAPTER, values)
        dist.barrier()

    def _advance(self) -> None:
        """One optimizer step, with validation where it is due; refuses a loss that has diverged."""
        settings, plan = self.job.settings, self.plan
        rate, head_rate = _learning_rates(settings, plan, self.step)
        zero.set_learning_rate(self.engine, rate, head_rate)
        record = optimizer_step(self.adapted, self.engine, plan, self.samples, self.step, self.objective)
        record |= {"step": self.step + 1, "steps": plan.steps, "learning_rate": rate, "time_s": time.time()}
        self.step += 1
        if self.validation is not None and self.history.is_due(self.step, plan.steps):
            loss = validation_loss(self.engine, self.validation, settings.micro_batch_size, self.objective)
            self.history.losses[self.step] = record["validation_loss"] = loss
        if self.journal:
            self.journal.append([record])
        self._refuse_divergence(record)

    def _refuse_divergence(self, record: dict[str, float]) -> None:
        reason = divergence(record, *self.objective.largest_loss)
        if reason is None:
            return
        indices = self.plan.samples(self.step - 1)[:4]
        sources = ", ".join(self.samples[int(index)]["source"] for index in indices)
        last = newest_step(self.job.checkpoints)
        kept = f"the checkpoint of step {last} is kept" if last else "there is no checkpoint yet"
        raise TrainingError(
            f"{reason} in step {self.step} (samples {sources}, ...); {kept}; "
            "lower train.learning_rate or train.gradient_clipping, or look at those samples"
        )

    def _save_checkpoint(self) -> None:
        allocation = self.adapted.allocation
        values = zero.whole_parameters(self.engine, self.adapted.parameters)
        moments = zero.whole_moments(self.engine, self.adapted.parameters)
        checkpoint = Checkpoint(self.step, values, moments, allocation.state() if allocation else {})
        if self.journal:
            # A worker that Ray has lost sight of may still live; it must not overwrite what its successor has saved.
            if not self.journal.is_current():
                raise RuntimeError("another run has taken this training over")
            save_checkpoint(
                self.job.checkpoints, checkpoint, self.job.settings.checkpoints_kept, self.history.best_step
            )


def _start(job: TrainJob) -> _Training:
    """Load data and base, attach the method, start the engine, and restore the newest checkpoint."""
    settings = job.settings
    prepared = load_prepared(job.prepared)
    samples = prepared.train
    plan = BatchPlan(
        lengths=token_counts(samples).tolist(),
        labels=[1] * len(samples) if prepared.head.is_new else label_counts(samples).tolist(),
        steps=optimizer_steps(settings, len(samples)),
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        workers=dist.get_world_size(),
        seed=settings.seed,
        pack_tokens=settings.pack_tokens,
    )
    deepspeed = with_accumulation(job.deepspeed, plan.workers, plan.accumulation_steps)
    # Stage 3 has to be announced before the base is loaded, so that no rank ever holds all of it.
    with zero.partitioned_loading(deepspeed):
        model = load_base(job.base_folder, settings.precision, prepared.head, settings.seed)
        objective = objective_of(model, prepared.head, samples)
        trained_modules = tuple(head_modules(model)) if prepared.head.is_new else ()
        adapted = _attach(model, job, plan.steps, trained_modules, prepared.head)
        if settings.gradient_checkpointing:
            # The embeddings are frozen, and reentrant checkpointing loses the gradients of a block whose input requires none.
            model.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        head = [p for name, p in adapted.parameters.items() if is_within(name, trained_modules)]
        engine = zero.start_engine(model, deepspeed, settings.weight_decay, settings.collective_timeout_s, head)
    model.train()
    step = _resume(job, engine, adapted)
    journal = _take_over_journal(job, step)
    history = _restored_history(settings, journal)
    return _Training(job, plan, samples, prepared.validation, objective, adapted, engine, step, journal, history)


def _attach(model: nn.Module, job: TrainJob, steps: int, trained_modules: Sequence[str], head: Head) -> Adapted:
    started = time.perf_counter()
    adapted = job.method.attach(model, job.settings.seed, steps, trained_modules, head)
    if dist.get_rank() == 0:
        facts = {
            "trainable_parameters": sum(map(zero.element_count, adapted.parameters.values())),
            "attach_s": time.perf_counter() - started,
        }
        (job.work / ATTACHED).write_text(json.dumps(facts), encoding="utf-8")
    return adapted


def _resume(job: TrainJob, engine: Any, adapted: Adapted) -> int:
    """Restore the newest sound checkpoint that rank 0 sees, or else the adapter to warm-start from.

    Returns:
        The optimizer steps already done.
    """
    parameters, start = adapted.parameters, adapted.start
    found: list[Checkpoint | None] = [None]
    if dist.get_rank() == 0:
        # A checkpoint beyond the journal can only be by a worker of an earlier run, after this run took over from it.
        recorded = max((record.get("step", 0) for record in read_journal(job.work / JOURNAL)), default=0)
        found = [newest_sound_checkpoint(job.checkpoints, at_most=recorded)]
    # Broadcast, since the other ranks may be on nodes that have no checkpoint yet.
    dist.broadcast_object_list(found)
    checkpoint = found[0]
    if checkpoint:
        zero.restore_state(engine, parameters, checkpoint.values, checkpoint.moments, checkpoint.step)
        if adapted.allocation:
            adapted.allocation.restore(checkpoint.allocation)
    elif start is not None:
        # The engine made its fp32 master copy from parameters rounded to bf16. AdamW's moments start from zero.
        moments = {f"{moment}/{name}": torch.zeros_like(start[name]) for moment in zero.MOMENTS for name in parameters}
        zero.restore_state(engine, parameters, start, moments, 0)
    return checkpoint.step if checkpoint else 0


def _take_over_journal(job: TrainJob, step: int) -> JournalWriter | None:
    """Rank 0's journal, cut back to `step`; None on the other ranks."""
    if dist.get_rank():
        return None
    return JournalWriter(job.work / JOURNAL, keep=lambda record: record.get("step", math.inf) <= step)


def _restored_history(settings: TrainSettings, journal: JournalWriter | None) -> ValidationHistory:
    """The validation losses of the interrupted run, the same on every rank."""
    records = journal.kept if journal else []
    losses = [{record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}]
    dist.broadcast_object_list(losses)
    return ValidationHistory(settings.validate_every, settings.patience, losses[0])


def _learning_rates(settings: TrainSettings, plan: BatchPlan, step: int) -> tuple[float, float]:
    """The rates of the adapter and of a new head in a step: one schedule, two peaks."""
    peaks = settings.learning_rate, settings.head_learning_rate or settings.learning_rate
    adapter, head = (learning_rate(step, plan.steps, peak, settings.warmup_share, settings.schedule) for peak in peaks)
    return adapter, head


def _any_rank(value: bool, device: torch.device) -> bool:
    votes = torch.tensor(float(value), device=device)
    dist.all_reduce(votes)
    return bool(votes)


def _silence_libraries() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_DISABLE", "1")
