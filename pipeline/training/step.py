"""One optimizer step: forward and backward over the global batch, what it reports, and whether it has diverged."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.methods.method import Adapted
from pipeline.training import zero
from pipeline.training.batches import BatchPlan
from pipeline.training.objective import Objective


def optimizer_step(
    adapted: Adapted, engine: Any, plan: BatchPlan, samples: Any, step: int, objective: Objective
) -> dict[str, float]:
    """Train on this rank's share of the global batch of one step; collective.

    Args:
        step: the step, counted from 0.

    Returns:
        `loss`, which is the sum of `task_loss` and the method's penalties, and `gradient_norm` where DeepSpeed computes it;
        `tokens_per_second` of all ranks; `data_wait_share` and peak `memory_gib` of this rank.
    """
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
        batch = _batch(indices, plan, samples, objective).to(device)
        waited += time.perf_counter() - asked
        loss_sum = objective.losses(engine, batch).sum()
        # Gathered after the forward pass: in it stage 3 releases each layer's parameters behind it, gathered before or not.
        with zero.gathered(engine, regularised):
            penalties = adapted.penalties() if adapted.penalties else {}
            # DeepSpeed averages over ranks and accumulation steps; this makes it the mean over the labels of the global batch.
            share = world * len(micro_batches) / batch_labels
            engine.backward(loss_sum * share + sum(penalties.values()))
        if adapted.allocation and engine.is_gradient_accumulation_boundary():
            adapted.allocation.before_step()
        engine.step()
        totals += torch.tensor([loss_sum.item(), batch.token_count], dtype=torch.float64, device=device)
    if adapted.allocation:
        adapted.allocation.after_step(step)
    dist.all_reduce(totals)
    losses = _losses(totals[0].item() / batch_labels, penalties, engine.get_global_grad_norm())
    seconds = time.perf_counter() - started
    return {
        **losses,
        "tokens_per_second": totals[1].item() / seconds,
        "data_wait_share": waited / seconds,
        "memory_gib": _memory_gib(device),
    }


def divergence(record: Mapping[str, float], largest: float, guessing: float) -> str | None:
    """How a step has gone wrong for good: loss or gradient are not finite, or the loss has exploded.

    Args:
        record: the result of `optimizer_step`.
        largest: the mean loss above which it has exploded (`Objective.largest_loss`).
        guessing: the mean loss of a guess, for the message.

    Returns:
        The reason in words, or None.
    """
    for name, value in (("loss", record["loss"]), ("gradient's norm", record.get("gradient_norm", 0.0))):
        if not math.isfinite(value):
            return f"the {name} became {value}"
    if record["task_loss"] > largest:
        return f"the loss exploded to {record['task_loss']:.4g}, where guessing costs {guessing:.4g}"
    return None


def _batch(indices: np.ndarray, plan: BatchPlan, samples: Any, objective: Objective) -> Any:
    # A worker with nothing to do runs a sample without labels: under stage 3 all ranks must run equally many forward passes.
    chosen = [samples[int(index)] for index in indices] or [objective.without_labels(samples[0])]
    return objective.batch(chosen, packed=plan.pack_tokens is not None)


def _losses(task_loss: float, penalties: Mapping[str, torch.Tensor], gradient_norm: Any) -> dict[str, float]:
    weighted = {name: float(value) for name, value in penalties.items()}
    norm = {} if gradient_norm is None else {"gradient_norm": float(gradient_norm)}
    return {"loss": task_loss + sum(weighted.values()), "task_loss": task_loss, **weighted, **norm}


def _memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
