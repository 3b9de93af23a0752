"""The interface between the training stage and a method: how it is put into a base, what is trained, and how that is saved.

The module that `MethodSpec.module` names has

    def build(recipe, base, targets, spectra, start) -> Method

and, where the spec has no formula for it, `parameter_count(name, targets, model) -> int`. `spectra` is the folder of the
components that the spectra stage computed, None where the method begins with none; `start` that of the adapter to warm-start
from, None where training begins from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from pipeline.models.prompting import LANGUAGE_MODEL, Head

Tensors = Mapping[str, torch.Tensor]


class Method(Protocol):
    """A method with its hyperparameters; it can be pickled and sent to the training workers."""

    def attach(
        self, model: nn.Module, seed: int, steps: int, modules_to_save: Sequence[str] = (), head: Head = LANGUAGE_MODEL
    ) -> Adapted:
        """Put the method into a loaded base, in place.

        Args:
            model: the base, whole, or partitioned by ZeRO-3 while it was loaded.
            seed: decides whatever is random, so that a resumed run begins as the first one did.
            steps: how many optimizer steps the training has.
            modules_to_save: names of modules that are trained as a whole beside the adapter and saved with it: a new head.
            head: what the model answers with.

        Raises:
            KasaError: the method cannot be used on this base.
        """


class Allocation(Protocol):
    """What a method does between optimizer steps, with a state of its own that checkpoints keep."""

    def before_step(self) -> None:
        """Called when the gradients of a step are complete, before the optimizer uses them."""

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step number `step`, counted from 0."""

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that later steps depend on."""

    def restore(self, state: Tensors) -> None:
        """Continue from what `state` returned."""


@dataclass(frozen=True)
class Adapted:
    """A base with a method in it.

    Attributes:
        parameters: what is trained, by names that stay the same from run to run.
        save: (folder, values) -> None writes the trained values, fp32 by the names of `parameters`, as a folder that
            `pipeline.methods.loading` reads. A folder that is there is replaced.
        penalties: the weighted terms that are added to the task loss, by their names in the journal. They need
            `parameters` whole, not partitioned.
        start: the values to begin with, where the engine's rounding to bf16 must not touch them.
        allocation: what is done between steps, if anything.
    """

    parameters: Mapping[str, nn.Parameter]
    save: Callable[[Path, Tensors], None]
    penalties: Callable[[], dict[str, torch.Tensor]] | None = None
    start: Tensors | None = None
    allocation: Allocation | None = None
