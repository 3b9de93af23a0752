"""What each training process does. One process is world size 1 of the same code.

Rank 0 alone writes: the journal (one record a step), the checkpoints, and at the end the adapter. Whoever watches reads
the journal; nothing here knows of Ray or MLflow.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from kasa import KasaConfig, KasaError, adapted_layers, attach, penalty, save_adapter
from kasa.adapter import frozen_factors, trainable_parameters
from kasa.adapter_file import SavedAdapter
from kasa.spectra_file import load_spectra
from kasa.targets import Target
from pipeline.base_model import load_base
from pipeline.deepspeed_config import with_passes
from pipeline.errors import TrainingError
from pipeline.journal import JournalWriter, Record, append_journal, read_journal
from pipeline.language_model import collate, label_losses, pack
from pipeline.prepare.stage import load_prepared
from pipeline.recipe import TrainSettings
from pipeline.training import zero
from pipeline.training.batches import BatchPlan, learning_rate, optimizer_steps
from pipeline.training.checkpoints import Checkpoint, load_checkpoint, newest_step, save_checkpoint
from pipeline.training.validation import Looks, validation_loss

JOURNAL = "journal.jsonl"
ADAPTER = "adapter"


@dataclass(frozen=True)
class TrainJob:
    """All that a training process needs to know.

    Attributes:
        base_name, base_folder: the base model.
        prepared: folder of the prepared data.
        spectra: folder of the spectra.
        work: the folder this stage fills; checkpoints in it are resumed from.
        targets, config: the adapter.
        settings: the recipe's `train` section.
        deepspeed: the complete DeepSpeed configuration.
    """

    base_name: str
    base_folder: Path
    prepared: Path
    spectra: Path
    work: Path
    targets: tuple[Target, ...]
    config: KasaConfig
    settings: TrainSettings
    deepspeed: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.work / "checkpoints"


def train_worker(job: TrainJob) -> None:
    """Train from the newest checkpoint to the end; torch's process group must exist.

    Whatever is raised here is tried again, as if the process had died. That is right for lost peers and full memory, which
    torch reports as RuntimeError. Any other error would only come again: it is written to the journal, where the next
    attempt finds it and ends at once.
    """
    if journalled_error(job.work / JOURNAL):
        return
    _quiet()
    torch.set_num_threads(max(1, int(job.settings.cpus_per_worker)))
    try:
        _train(job)
    except (RuntimeError, ConnectionError):
        raise
    except Exception as error:
        mistake = isinstance(error, KasaError)
        text = str(error) if mistake else f"{type(error).__name__}: {error}"
        append_journal(job.work / JOURNAL, [{"error": text, "mistake": mistake}])
        raise


def journalled_error(journal: Path) -> Record | None:
    """The error that ended training, with its text as `error` and whether the user can mend it as `mistake`."""
    return next((record for record in read_journal(journal) if "error" in record), None)


def _train(job: TrainJob) -> None:
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
    deepspeed = with_passes(job.deepspeed, plan.workers, plan.passes)

    # Stage 3 has to be announced before the base is loaded, so that no rank ever holds all of it.
    with zero.partitioned_loading(deepspeed):
        model = load_base(job.base_folder, settings.precision)
        spectra, digests = load_spectra(job.spectra)
        attach(model, job.targets, job.config, spectra, settings.seed)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        dropped = {name: factor.detach().clone() for name, factor in frozen_factors(model).items()}
        engine = zero.start_engine(model, deepspeed, settings.weight_decay)
    model.train()
    parameters = trainable_parameters(model)
    step = _resume(job, engine, parameters)
    journal = _take_over(job, step)
    looks = _earlier_looks(settings, journal)

    while step < plan.steps and not looks.is_exhausted:
        rate = learning_rate(step, plan.steps, settings.learning_rate, settings.warmup_share, settings.schedule)
        zero.set_learning_rate(engine, rate)
        record = _optimizer_step(job, engine, plan, samples, step)
        record |= {"step": step + 1, "steps": plan.steps, "learning_rate": rate}
        indices = plan.samples(step)
        step += 1
        if validation is not None and looks.is_due(step, plan.steps):
            looks.losses[step] = validation_loss(engine, validation, settings.micro_batch_size)
            record["validation_loss"] = looks.losses[step]
        if journal:
            journal.append([record])
        _refuse_divergence(record, indices, samples, job)
        if step < plan.steps and (step % settings.checkpoint_every == 0 or step == looks.best_step):
            _save_checkpoint(job, engine, parameters, step, journal, looks.best_step)

    values = zero.whole_parameters(engine, parameters)
    if dist.get_rank() == 0:
        if looks.best_step not in (None, step):
            values = load_checkpoint(job.checkpoints, looks.best_step).values
        adapter = SavedAdapter(job.config, job.targets, job.base_name, digests, values, dropped)
        save_adapter(job.work / ADAPTER, adapter)
    dist.barrier()


def _optimizer_step(job: TrainJob, engine: Any, plan: BatchPlan, samples: Any, step: int) -> dict[str, float]:
    """Forward and backward over this rank's share of the global batch, one optimizer step; what happened, as numbers."""
    started, waited = time.perf_counter(), 0.0
    world, rank, device = dist.get_world_size(), dist.get_rank(), engine.device
    batch_labels = sum(_label_count(samples[int(index)]) for index in plan.samples(step))
    micro_batches = plan.micro_batches(step, rank)
    # Dropout depends on seed, step and rank alone, so a resumed run repeats it.
    torch.manual_seed(hash((job.settings.seed, step, rank)) & 0x7FFFFFFF)
    layers = adapted_layers(engine.module).values()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for indices in micro_batches:
        asked = time.perf_counter()
        chosen = [samples[int(index)] for index in indices]
        batch = (collate(chosen) if plan.pack_tokens is None else pack(chosen)).to(device)
        waited += time.perf_counter() - asked
        loss_sum = label_losses(engine, batch).sum()
        # After the forward pass, in which stage 3 releases each layer's parameters behind it, gathered before or not.
        with zero.gathered(engine, trainable_parameters(engine.module).values()):
            regularisers = penalty(layers, job.config.regulariser)
            # DeepSpeed averages over ranks and passes; this makes it the mean over the labels of the global batch.
            share = world * len(micro_batches) / batch_labels
            engine.backward(loss_sum * share + regularisers.weighted(job.config))
        engine.step()
        totals += torch.tensor([loss_sum.item(), batch.token_count], dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    task_loss, tokens = totals[0].item() / batch_labels, totals[1].item()
    gradient_norm = engine.get_global_grad_norm()
    return {
        "loss": task_loss + float(regularisers.weighted(job.config)),
        "task_loss": task_loss,
        # Weighted, so that the three parts add up to the loss.
        "singular_value_penalty": job.config.singular_value_weight * float(regularisers.singular_value),
        "orthogonality_penalty": job.config.orthogonality_weight * float(regularisers.orthogonality),
        **({} if gradient_norm is None else {"gradient_norm": float(gradient_norm)}),
        "tokens_per_second": tokens / (time.perf_counter() - started),
        "data_wait_share": waited / (time.perf_counter() - started),
        "memory_gib": _memory_gib(device),
    }


def _label_count(sample: dict[str, Sequence[int]]) -> int:
    return sum(label >= 0 for label in sample["labels"][1:])


def _resume(job: TrainJob, engine: Any, parameters: dict[str, nn.Parameter]) -> int:
    """Restore the newest checkpoint that rank 0 sees; returns the steps already done."""
    found = [0]
    if dist.get_rank() == 0:
        # Beyond the journal only an earlier run's worker can have saved, after this run took over from it.
        recorded = max((record.get("step", 0) for record in read_journal(job.work / JOURNAL)), default=0)
        found = [newest_step(job.checkpoints, at_most=recorded)]
    dist.broadcast_object_list(found)
    step = int(found[0])
    if step:
        checkpoint = load_checkpoint(job.checkpoints, step)
        zero.restore_state(engine, parameters, checkpoint.values, checkpoint.moments, step)
    return step


def _take_over(job: TrainJob, step: int) -> JournalWriter | None:
    """Rank 0's journal, cut back to `step`."""
    if dist.get_rank():
        return None
    return JournalWriter(job.work / JOURNAL, keep=lambda record: record.get("step", math.inf) <= step)


def _earlier_looks(settings: TrainSettings, journal: JournalWriter | None) -> Looks:
    """What an interrupted run has seen of the validation samples; the same on every rank."""
    records = journal.kept if journal else []
    seen = [{record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}]
    dist.broadcast_object_list(seen)
    return Looks(settings.validate_every, settings.patience, seen[0])


def _save_checkpoint(
    job: TrainJob,
    engine: Any,
    parameters: dict[str, nn.Parameter],
    step: int,
    journal: JournalWriter | None,
    best: int | None,
) -> None:
    checkpoint = Checkpoint(step, zero.whole_parameters(engine, parameters), zero.whole_moments(engine, parameters))
    if journal:
        if not journal.is_current():
            raise RuntimeError("another run has taken this training over")
        save_checkpoint(job.checkpoints, checkpoint, job.settings.checkpoints_kept, best)


def _refuse_divergence(record: dict[str, float], indices: np.ndarray, samples: Any, job: TrainJob) -> None:
    if math.isfinite(record["loss"]) and math.isfinite(record.get("gradient_norm", 0.0)):
        return
    sources = ", ".join(samples[int(index)]["source"] for index in indices[:4])
    last = newest_step(job.checkpoints)
    kept = f"the checkpoint of step {last} is kept" if last else "there is no checkpoint yet"
    raise TrainingError(
        f"the loss became {record['loss']} in step {record['step']} (samples {sources}, ...); {kept}; "
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
