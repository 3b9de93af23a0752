"""Validation during training: the loss on the validation samples, which step was best, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from pipeline.training.objective import Objective


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
