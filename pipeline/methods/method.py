"""What the training stage knows of a method: how to put it into a base, and what that leaves to be trained and saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from kasa.targets import is_within
from pipeline.models.heads import LANGUAGE_MODEL, Head
from pipeline.models.loading import head_modules

Tensors = Mapping[str, torch.Tensor]


class Method(Protocol):
    """A method with its hyperparameters; it can be sent to the training workers."""

    def attach(
        self, model: nn.Module, seed: int, steps: int, whole: Sequence[str] = (), head: Head = LANGUAGE_MODEL
    ) -> Adapted:
        """Put the method into a loaded base, in place.

        Args:
            model: whole, or partitioned by ZeRO-3 as it was loaded.
            seed: decides whatever is random, so that a resumed run begins as the first one did.
            steps: how many optimizer steps the training has.
            whole: modules to train whole beside, a new head, by name.
            head: what the model answers with.

        Raises:
            KasaError: the method cannot be used on this base.
        """


class Allocation(Protocol):
    """What a method does between the optimizer's steps, with a state of its own that checkpoints keep."""

    def before_step(self) -> None:
        """The gradients of the step are complete, and not used yet."""

    def after_step(self, step: int) -> None:
        """The optimizer has done its step number `step`, counted from 0."""

    def state(self) -> dict[str, torch.Tensor]:
        """All that later steps depend on."""

    def restore(self, state: Tensors) -> None:
        """Go on from what `state` gave."""


@dataclass(frozen=True)
class Adapted:
    """A base with a method in it.

    Attributes:
        parameters: what is trained, by names that stay the same from run to run.
        save: (folder, values) -> None writes the trained values, fp32 by the names of `parameters`, as a folder that
            `pipeline.methods.loading` reads; one that is there is replaced.
        penalties: what is added to the task loss, weighted, by the names it has in the journal; needs `parameters` whole.
        start: the values to begin with, where the engine's rounding to bf16 must not touch them.
        allocation: what is done between steps, if anything.
    """

    parameters: Mapping[str, nn.Parameter]
    save: Callable[[Path, Tensors], None]
    penalties: Callable[[], dict[str, torch.Tensor]] | None = None
    start: Tensors | None = None
    allocation: Allocation | None = None


def adalora_rank(rank: int) -> int:
    """The rank that AdaLoRA begins with, to end at `rank` on average: half as much again, as its authors' settings have it."""
    return (3 * rank + 1) // 2


def norm_names(model: nn.Module) -> list[str]:
    """The normalisation layers of the body: modules without children, of a class called so, with a weight."""
    beside = head_modules(model)
    return [
        name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and not list(module.children()) and hasattr(module, "weight")
        if not is_within(name, beside)
    ]
