"""ValidationHistory at the validation samples during training: the loss there, which look was the best, and when to stop.

When a training has gone wrong for good: a pure decision on the numbers of one step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from pipeline.training.objective import Objective


@dataclass
class ValidationHistory:
    """The validation losses of a run so far, in the order of steps.

    Attributes:
        every: optimizer steps between looks.
        patience: how many looks without a lower loss end the training; None: never.
    """

    every: int
    patience: int | None
    losses: dict[int, float] = field(default_factory=dict)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to look after step `step` of `steps`; always after the last one."""
        return step % self.every == 0 or step == steps

    @property
    def best_step(self) -> int | None:
        """The step of the lowest loss, the earliest of equals; None before the first look."""
        return min(self.losses, key=lambda step: (self.losses[step], step), default=None)

    @property
    def should_stop(self) -> bool:
        """Whether the last `patience` looks were all no better than one before."""
        if self.patience is None or self.best_step is None:
            return False
        return sum(step > self.best_step for step in self.losses) >= self.patience


@torch.no_grad()
def validation_loss(engine: Any, samples: Sequence[Any], micro_batch_size: int, objective: Objective) -> float:
    """Mean loss over all labels of `samples`; collective.

    Every rank runs equally many forward passes, as stage 3 needs: where samples run out, one is repeated and not counted.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    order = sorted(range(len(samples)), key=lambda index: len(samples[index]["input_ids"]))
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    engine.eval()
    for turn in range(math.ceil(len(order) / (world * micro_batch_size))):
        first = turn * world * micro_batch_size
        mine = order[first : first + world * micro_batch_size][rank::world]
        chosen = [samples[index] for index in mine or order[:1]]
        losses = objective.losses(engine, objective.batch(chosen, packed=False).to(engine.device))
        if mine:
            totals += torch.tensor([losses.sum().item(), sum(map(objective.count, chosen))]).to(totals)
    engine.train()
    dist.all_reduce(totals)
    return float(totals[0] / totals[1])


def what_went_wrong(record: Mapping[str, float], largest: float, guessing: float) -> str | None:
    """In words, where the loss or the gradient is no number any more, or the loss explodes; None where all is well.

    A loss explodes above `largest` (`Objective.largest_loss`); what guessing costs is only said.
    """
    for name, value in (("loss", record["loss"]), ("gradient's norm", record.get("gradient_norm", 0.0))):
        if not math.isfinite(value):
            return f"the {name} became {value}"
    if record["task_loss"] > largest:
        return f"the loss exploded to {record['task_loss']:.4g}, where guessing costs {guessing:.4g}"
    return None
