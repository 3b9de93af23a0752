"""What the truncation takes from each layer's output for real text, measured while the untouched model runs.

Legend: N = tokens, O = out features, I = in features, D = dropped rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class OutputShares:
    """Energies of what a layer puts out and of the part that truncation would take away, summed over tokens."""

    def __init__(self) -> None:
        self._dropped: dict[str, float] = {}
        self._whole: dict[str, float] = {}

    def add(self, name: str, dropped: torch.Tensor, whole: torch.Tensor) -> None:
        """Count a forward pass."""
        self._dropped[name] = self._dropped.get(name, 0.0) + float(dropped.detach().float().square().sum())
        self._whole[name] = self._whole.get(name, 0.0) + float(whole.detach().float().square().sum())

    def shares(self) -> dict[str, float]:
        """Layer -> ||D x||^2 / ||W x||^2 over all tokens, where D is dropped: 0 changes nothing, 1 is as bad as no layer."""
        return {name: self._dropped[name] / whole if whole else 0.0 for name, whole in self._whole.items()}


@contextmanager
def observe_dropped(
    model: nn.Module, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[OutputShares]:
    """Within the block every forward pass of the plain `model` adds to the shares. Pad nothing.

    Args:
        factors: layer name -> (left_OD, right_DI), as `Triplets.dropped_factors` gives them.
    """
    shares = OutputShares()

    def hook_of(name: str, left_OD: torch.Tensor, right_DI: torch.Tensor) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].float()
            dropped = functional.linear(functional.linear(x, right_DI.to(x.device)), left_OD.to(x.device))
            bias = getattr(module, "bias", None)
            shares.add(name, dropped, output if bias is None else output - bias)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_of(name, *pair)) for name, pair in factors.items()]
    try:
        yield shares
    finally:
        for handle in handles:
            handle.remove()
