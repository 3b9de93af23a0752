"""What each training process does. One process is world size 1 of the same code.

Rank 0 alone writes: the journal (one record a step), the checkpoints, and at the end the adapter. Whoever watches reads
the journal; nothing here knows of Ray or MLflow.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from kasa.errors import KasaError
from kasa.targets import is_within
from pipeline.config.deepspeed import with_accumulation
from pipeline.config.training import TrainSettings
from pipeline.core.errors import TrainingError
from pipeline.core.files import ADAPTER
from pipeline.core.journal import JournalWriter, append_journal, read_journal
from pipeline.data.prepared import load_prepared
from pipeline.methods.method import Adapted
from pipeline.models.heads import Head, head_modules
from pipeline.models.loading import load_base
from pipeline.training import zero
from pipeline.training.batches import BatchPlan, learning_rate, optimizer_steps
from pipeline.training.checkpoints import (
    Checkpoint,
    load_checkpoint,
    newest_sound_checkpoint,
    newest_step,
    save_checkpoint,
)
from pipeline.training.hang_detector import HangDetector
from pipeline.training.job import ATTACHED, ERRORS, JOURNAL, NOTICES, ROLL_CALL, TrainJob, journalled_error
from pipeline.training.objective import Objective, objective_of
from pipeline.training.validation import ValidationHistory, validation_loss, what_went_wrong

_TIMED_OUT = re.compile("timed out|timeout", re.IGNORECASE)


def train_worker(job: TrainJob, node_leaves: Callable[[], bool] = lambda: False) -> None:
    """Train from the newest checkpoint to the end; torch's process group must exist.

    When one of the workers hears from its `node_leaves` that a node of theirs is about to go, a checkpoint is saved at once.

    Whatever is raised here is tried again, as if the process had died. That is right for lost peers and full memory, which
    torch reports as RuntimeError. Any other error would only come again: it is written to the journal, where the next
    attempt finds it and ends at once.
    """
    if journalled_error(job.work):
        return
    _quiet()
    torch.set_num_threads(max(1, int(job.settings.cpus_per_worker)))
    roll_call = HangDetector(job.work / ROLL_CALL)
    try:
        _train(job, node_leaves)
    except (RuntimeError, ConnectionError, MemoryError) as error:
        if _TIMED_OUT.search(str(error)):
            roll_call.raise_for_missing_ranks(error)
        raise
    except Exception as error:
        if not dist.is_initialized():
            raise  # not an error of its own: the workers are being ended, for a node leaves or others join
        mistake = isinstance(error, KasaError)
        text = str(error) if mistake else f"{type(error).__name__}: {error}"
        errors = job.work / ERRORS
        errors.mkdir(exist_ok=True)
        append_journal(errors / f"{dist.get_rank()}.jsonl", [{"error": text, "mistake": mistake}])
        raise


def _train(job: TrainJob, node_leaves: Callable[[], bool]) -> None:
    settings = job.settings
    prepared = load_prepared(job.prepared)
    samples, validation = prepared.train, prepared.validation
    plan = BatchPlan(
        lengths=[len(ids) for ids in samples["input_ids"]],
        steps=optimizer_steps(settings, len(samples)),
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        workers=dist.get_world_size(),
        seed=settings.seed,
        pack_tokens=settings.pack_tokens,
    )
    deepspeed = with_accumulation(job.deepspeed, plan.workers, plan.passes)

    # Stage 3 has to be announced before the base is loaded, so that no rank ever holds all of it.
    with zero.partitioned_loading(deepspeed):
        model = load_base(job.base_folder, settings.precision, prepared.head, settings.seed)
        objective = objective_of(model, prepared.head, samples)
        whole = tuple(head_modules(model)) if prepared.head.is_new else ()
        adapted = _attach(model, job, plan.steps, whole, prepared.head)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        head = [p for name, p in adapted.parameters.items() if is_within(name, whole)]
        engine = zero.start_engine(model, deepspeed, settings.weight_decay, settings.collective_timeout_s, head)
    model.train()
    step = _resume(job, engine, adapted)
    journal = _take_over(job, step)
    looks = _earlier_looks(settings, journal)
    notified = False

    while step < plan.steps and not looks.should_stop:
        rate, head_rate = _learning_rates(settings, plan, step)
        zero.set_learning_rate(engine, rate, head_rate)
        record = _optimizer_step(adapted, engine, plan, samples, step, objective)
        record |= {"step": step + 1, "steps": plan.steps, "learning_rate": rate, "time_s": time.time()}
        indices = plan.samples(step)
        step += 1
        if validation is not None and looks.is_due(step, plan.steps):
            looks.losses[step] = validation_loss(engine, validation, settings.micro_batch_size, objective)
            record["validation_loss"] = looks.losses[step]
        if journal:
            journal.append([record])
        _refuse_divergence(record, objective, indices, samples, job)
        due = step % settings.checkpoint_every == 0 or step == looks.best_step
        if not notified and _anyone(node_leaves(), engine.device):
            notified = due = True
            if journal:
                said = f"a node is about to be taken away; the state after step {step} is saved"
                append_journal(job.work / NOTICES, [{"interruption": said}])
        if due and step < plan.steps:
            _save_checkpoint(job, engine, adapted, step, journal, looks.best_step)

    values = zero.whole_parameters(engine, adapted.parameters)
    if dist.get_rank() == 0:
        if looks.best_step not in (None, step):
            values = load_checkpoint(job.checkpoints, looks.best_step).values
        adapted.save(job.work / ADAPTER, values)
    dist.barrier()


def _learning_rates(settings: TrainSettings, plan: BatchPlan, step: int) -> tuple[float, float]:
    """Those of the adapter and of a new head in a step: one schedule, two peaks."""
    peaks = settings.learning_rate, settings.head_learning_rate or settings.learning_rate
    adapter, head = (learning_rate(step, plan.steps, peak, settings.warmup_share, settings.schedule) for peak in peaks)
    return adapter, head


def _attach(model: nn.Module, job: TrainJob, steps: int, whole: Sequence[str], head: Head) -> Adapted:
    started = time.perf_counter()
    adapted = job.method.attach(model, job.settings.seed, steps, whole, head)
    if dist.get_rank() == 0:
        facts = {
            "trainable_parameters": sum(map(zero.element_count, adapted.parameters.values())),
            "attach_s": time.perf_counter() - started,
        }
        (job.work / ATTACHED).write_text(json.dumps(facts), encoding="utf-8")
    return adapted


def _optimizer_step(
    adapted: Adapted, engine: Any, plan: BatchPlan, samples: Any, step: int, objective: Objective
) -> dict[str, float]:
    """Forward and backward over this rank's share of the global batch, one optimizer step; what happened, as numbers."""
    started, waited = time.perf_counter(), 0.0
    world, rank, device = dist.get_world_size(), dist.get_rank(), engine.device
    batch_labels = sum(objective.count(samples[int(index)]) for index in plan.samples(step))
    micro_batches = plan.micro_batches(step, rank)
    # Dropout depends on seed, step and rank alone, so a resumed run repeats it.
    torch.manual_seed(hash((plan.seed, step, rank)) & 0x7FFFFFFF)
    regularised = list(adapted.parameters.values()) if adapted.penalties else []
    penalties: dict[str, torch.Tensor] = {}
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for indices in micro_batches:
        asked = time.perf_counter()
        chosen = [samples[int(index)] for index in indices] or [objective.without_labels(samples[0])]
        # A worker with nothing to do runs a pass without labels: all workers must run equally many.
        batch = objective.batch(chosen, packed=plan.pack_tokens is not None).to(device)
        waited += time.perf_counter() - asked
        loss_sum = objective.losses(engine, batch).sum()
        # After the forward pass, in which stage 3 releases each layer's parameters behind it, gathered before or not.
        with zero.gathered(engine, regularised):
            penalties = adapted.penalties() if adapted.penalties else {}
            # DeepSpeed averages over ranks and passes; this makes it the mean over the labels of the global batch.
            share = world * len(micro_batches) / batch_labels
            engine.backward(loss_sum * share + sum(penalties.values()))
        if adapted.allocation and engine.is_gradient_accumulation_boundary():
            adapted.allocation.before_step()
        engine.step()
        totals += torch.tensor([loss_sum.item(), batch.token_count], dtype=torch.float64, device=device)
    if adapted.allocation:
        adapted.allocation.after_step(step)
    dist.all_reduce(totals)
    task_loss, tokens = totals[0].item() / batch_labels, totals[1].item()
    weighted = {name: float(value) for name, value in penalties.items()}
    gradient_norm = engine.get_global_grad_norm()
    return {
        # The parts add up to it.
        "loss": task_loss + sum(weighted.values()),
        "task_loss": task_loss,
        **weighted,
        **({} if gradient_norm is None else {"gradient_norm": float(gradient_norm)}),
        "tokens_per_second": tokens / (time.perf_counter() - started),
        "data_wait_share": waited / (time.perf_counter() - started),
        "memory_gib": _memory_gib(device),
    }


def _anyone(yes: bool, device: torch.device) -> bool:
    votes = torch.tensor(float(yes), device=device)
    dist.all_reduce(votes)
    return bool(votes)


def _resume(job: TrainJob, engine: Any, adapted: Adapted) -> int:
    """Restore the newest sound checkpoint that rank 0 sees, or the adapter to go on from; returns the steps already done."""
    parameters, start = adapted.parameters, adapted.start
    found: list[Checkpoint | None] = [None]
    if dist.get_rank() == 0:
        # Beyond the journal only an earlier run's worker can have saved, after this run took over from it.
        recorded = max((record.get("step", 0) for record in read_journal(job.work / JOURNAL)), default=0)
        found = [newest_sound_checkpoint(job.checkpoints, at_most=recorded)]
    # The others may be on nodes that have no checkpoint yet.
    dist.broadcast_object_list(found)
    checkpoint = found[0]
    if checkpoint:
        zero.restore_state(engine, parameters, checkpoint.values, checkpoint.moments, checkpoint.step)
        if adapted.allocation:
            adapted.allocation.restore(checkpoint.allocation)
    elif start is not None:
        # The engine made its fp32 master copy from parameters rounded to bf16; AdamW begins anew.
        moments = {f"{moment}/{name}": torch.zeros_like(start[name]) for moment in zero.MOMENTS for name in parameters}
        zero.restore_state(engine, parameters, start, moments, 0)
    return checkpoint.step if checkpoint else 0


def _take_over(job: TrainJob, step: int) -> JournalWriter | None:
    """Rank 0's journal, cut back to `step`."""
    if dist.get_rank():
        return None
    return JournalWriter(job.work / JOURNAL, keep=lambda record: record.get("step", math.inf) <= step)


def _earlier_looks(settings: TrainSettings, journal: JournalWriter | None) -> ValidationHistory:
    """What an interrupted run has seen of the validation samples; the same on every rank."""
    records = journal.kept if journal else []
    seen = [{record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}]
    dist.broadcast_object_list(seen)
    return ValidationHistory(settings.validate_every, settings.patience, seen[0])


def _save_checkpoint(
    job: TrainJob,
    engine: Any,
    adapted: Adapted,
    step: int,
    journal: JournalWriter | None,
    best: int | None,
) -> None:
    values = zero.whole_parameters(engine, adapted.parameters)
    moments = zero.whole_moments(engine, adapted.parameters)
    checkpoint = Checkpoint(step, values, moments, adapted.allocation.state() if adapted.allocation else {})
    if journal:
        if not journal.is_current():
            raise RuntimeError("another run has taken this training over")
        save_checkpoint(job.checkpoints, checkpoint, job.settings.checkpoints_kept, best)


def _refuse_divergence(
    record: dict[str, float], objective: Objective, indices: np.ndarray, samples: Any, job: TrainJob
) -> None:
    wrong = what_went_wrong(record, *objective.largest_loss)
    if wrong is None:
        return
    sources = ", ".join(samples[int(index)]["source"] for index in indices[:4])
    last = newest_step(job.checkpoints)
    kept = f"the checkpoint of step {last} is kept" if last else "there is no checkpoint yet"
    raise TrainingError(
        f"{wrong} in step {record['step']} (samples {sources}, ...); {kept}; "
        "lower train.learning_rate or train.gradient_clipping, or look at those samples"
    )


def _memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _quiet() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_DISABLE", "1")
