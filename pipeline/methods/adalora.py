"""AdaLoRA's budget (arXiv 2303.10512): between steps the least important singular triplets of all layers are set to zero.

PEFT's allocator does it. What it remembers of the steps before is state, which checkpoints keep so that a resumed run
decides as an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipeline.methods.method import Tensors

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_PATTERN = "rank_pattern"


class RankAllocation:
    """PEFT's allocator as an `Allocation`.

    Args:
        tuner: PEFT's AdaLoraModel.
        parameters: the trained ones, by their names in the model.
    """

    def __init__(self, tuner: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self._tuner = tuner
        self._config = tuner.peft_config["default"]
        self._parameters = parameters
        self._gradients: dict[str, torch.Tensor] = {}

    def before_step(self) -> None:
        """Keep the gradients, which the engine clears in its step; importance is value times gradient."""
        self._gradients = {
            name: parameter.grad.clone() for name, parameter in self._parameters.items() if parameter.grad is not None
        }

    def after_step(self, step: int) -> None:
        """Update the importances and, where it is time, set triplets to zero."""
        for name, gradient in self._gradients.items():
            self._parameters[name].grad = gradient
        self._tuner.update_and_allocate(step)
        for name in self._gradients:
            self._parameters[name].grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """See `Allocation.state`."""
        allocator = self._tuner.rankallocator
        found = {
            f"{average}/{name}": value.cpu()
            for average in _AVERAGES
            for name, value in getattr(allocator, average).items()
        }
        pattern = self._config.rank_pattern or {}
        return found | {f"{_PATTERN}/{name}": torch.tensor(kept) for name, kept in pattern.items()}

    def restore(self, state: Tensors) -> None:
        """See `Allocation.restore`."""
        split = {key: key.split("/", 1) for key in state}
        for average in _AVERAGES:
            values = {
                name: state[key].to(self._parameters[name].device)
                for key, (kind, name) in split.items()
                if kind == average
            }
            setattr(self._tuner.rankallocator, average, values)
        pattern = {name: state[key].tolist() for key, (kind, name) in split.items() if kind == _PATTERN}
        self._config.rank_pattern = pattern or None
