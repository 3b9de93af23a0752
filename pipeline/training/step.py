"""One optimizer step: the objective, forward and backward over the global batch, validation, and whether training diverged.

The loss of a step is the sum of the losses of all labelled tokens (or of all labels) in the global batch divided by their
number, whatever the number of workers.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pipeline.methods.method import Adapted
from pipeline.models.forward import (
    IGNORED,
    Batch,
    LabelledBatch,
    collate,
    collate_labelled,
    head_outputs,
    label_losses,
    pack,
    padding_token,
    sample_losses,
    vocabulary_size,
)
from pipeline.models.prompting import Head
from pipeline.training import zero
from pipeline.training.job import BatchPlan

Sample = Mapping[str, Any]

# A loss has exploded above so many times the loss of a guess. A batch has few labels of a head, so their mean varies more.
_TOKENS_EXPLODED, _LABELS_EXPLODED = 2.0, 50.0


class Objective(Protocol):
    """How samples become batches, and which losses they have."""

    def count(self, sample: Sample) -> int:
        """The number of losses of a sample."""

    def without_labels(self, sample: Sample) -> Sample:
        """The same sample without any loss."""

    def batch(self, samples: Sequence[Sample], packed: bool) -> Any:
        """Collate samples for one forward pass, padded or packed."""

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The losses of a batch, of any shape; zero where there is none."""

    @property
    def largest_loss(self) -> tuple[float, float]:
        """(mean loss above which training has diverged, mean loss of a guess)."""


@dataclass(frozen=True)
class TokenObjective:
    """Cross entropy of a language model's labelled tokens.

    Attributes:
        vocabulary: number of tokens in the vocabulary.
    """

    vocabulary: int

    def count(self, sample: Sample) -> int:
        """The number of labelled tokens. The first has nothing before it to be predicted from."""
        return sum(label >= 0 for label in sample["labels"][1:])

    def without_labels(self, sample: Sample) -> Sample:
        """The same tokens without labels."""
        return {**sample, "labels": [IGNORED] * len(sample["labels"])}

    def batch(self, samples: Sequence[Sample], packed: bool) -> Batch:
        """Collate samples, padded on the left or packed."""
        return pack(samples) if packed else collate(samples)

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Cross entropy in nats, shape (rows, positions with labels)."""
        return label_losses(model, batch)

    @property
    def largest_loss(self) -> tuple[float, float]:
        """(limit, loss of a uniform guess, which is the logarithm of the vocabulary's size)."""
        guessing = math.log(self.vocabulary)
        return _TOKENS_EXPLODED * guessing, guessing


@dataclass(frozen=True)
class LabelObjective:
    """Cross entropy or squared error of a new head's outputs.

    Attributes:
        head: the head.
        pad_token: the model's padding token.
        guessing: mean loss of a guess that ignores the text.
    """

    head: Head
    pad_token: int
    guessing: float

    def count(self, sample: Sample) -> int:
        """One label per sample."""
        return 1

    def without_labels(self, sample: Sample) -> Sample:
        """The same text with NaN as its label, which `sample_losses` counts as zero loss."""
        return {**sample, "label": math.nan}

    def batch(self, samples: Sequence[Sample], packed: bool) -> LabelledBatch:
        """Collate samples, padded on the right."""
        assert not packed, "recipes refuse it"
        return collate_labelled(samples, self.pad_token)

    def losses(self, model: nn.Module, batch: LabelledBatch) -> torch.Tensor:
        """Cross entropy in nats or squared error, shape (samples,)."""
        return sample_losses(head_outputs(model, batch), batch.labels_B, self.head)

    @property
    def largest_loss(self) -> tuple[float, float]:
        """(limit, loss of a guess)."""
        return _LABELS_EXPLODED * self.guessing, self.guessing


def objective_of(model: nn.Module, head: Head, samples: Any) -> Objective:
    """The objective of a model with this head on these training samples."""
    if not head.is_new:
        return TokenObjective(vocabulary_size(model))
    # A uniform guess of the class; for values 0, which is what an untrained head answers on average.
    guessing = (
        math.log(head.outputs)
        if head.kind == "classification"
        else sum(label**2 for label in samples["label"]) / len(samples)
    )
    return LabelObjective(head, padding_token(model), guessing)


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
    batch_labels = plan.batch_labels(step)
    micro_batches = plan.micro_batches(step, rank)
    # Dropout depends on seed, step and rank alone, so a resumed run repeats it.
    torch.manual_seed(hash((plan.seed, step, rank)) & 0x7FFFFFFF)
    regularised = list(adapted.parameters.values()) if adapted.penalties else []
    penalties: dict[str, torch.Tensor] = {}
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    # DeepSpeed averages over ranks and accumulation steps; this makes it the mean over the labels of the global batch.
    share = world * len(micro_batches) / batch_labels
    for number, indices in enumerate(micro_batches, start=1):
        asked = time.perf_counter()
        batch = _batch(indices, plan, samples, objective).to(device)
        waited += time.perf_counter() - asked
        loss_sum = objective.losses(engine, batch).sum()
        if number < len(micro_batches):
            engine.backward(loss_sum * share)
        else:
            # Once a step, for the adapter does not change before. Gathered after the forward pass: in it stage 3 releases each
            # layer's parameters behind it, gathered before or not.
            with zero.gathered(engine, regularised):
                penalties = adapted.penalties() if adapted.penalties else {}
                engine.backward(loss_sum * share + len(micro_batches) * sum(penalties.values()))
        if adapted.allocation and engine.is_gradient_accumulation_boundary():
            adapted.allocation.before_step()
        engine.step()
        # Added up where they are: reading a value here would wait for the GPU in every pass.
        totals += torch.stack([loss_sum.detach().double(), loss_sum.new_tensor(batch.token_count, dtype=torch.float64)])
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


@dataclass
class ValidationHistory:
    """The validation losses of a training so far.

    Attributes:
        every: optimizer steps between validations.
        patience: how many validations in a row without a lower loss end the training; None never ends it.
        losses: the mean loss by step, in the order of steps.
    """

    every: int
    patience: int | None
    losses: dict[int, float] = field(default_factory=dict)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to validate after step `step` of `steps`; always after the last one."""
        return step % self.every == 0 or step == steps

    @property
    def best_step(self) -> int | None:
        """The step of the lowest loss, the earliest of equals; None before the first validation."""
        return min(self.losses, key=lambda step: (self.losses[step], step), default=None)

    @property
    def should_stop(self) -> bool:
        """Whether the last `patience` validations were all no better than an earlier one."""
        if self.patience is None or self.best_step is None:
            return False
        return sum(step > self.best_step for step in self.losses) >= self.patience


@torch.no_grad()
def validation_loss(engine: Any, samples: Sequence[Any], micro_batch_size: int, objective: Objective) -> float:
    """Mean loss over all labels of the validation samples, the same on every rank; collective.

    Args:
        engine: the DeepSpeed engine; it is left in training mode.
        samples: the validation samples.
        micro_batch_size: samples of one rank per forward pass.
        objective: what is summed up and counted.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    order = sorted(range(len(samples)), key=lambda index: len(samples[index]["input_ids"]))
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    engine.eval()
    for turn in range(math.ceil(len(order) / (world * micro_batch_size))):
        first = turn * world * micro_batch_size
        mine = order[first : first + world * micro_batch_size][rank::world]
        # Stage 3 gathers parameters in every forward pass, so all ranks must run equally many: one without samples of its own
        # repeats one that is not counted.
        chosen = [samples[index] for index in mine or order[:1]]
        losses = objective.losses(engine, objective.batch(chosen, packed=False).to(engine.device))
        if mine:
            totals += torch.tensor([losses.sum().item(), sum(map(objective.count, chosen))]).to(totals)
    engine.train()
    dist.all_reduce(totals)
    return float(totals[0] / totals[1])
