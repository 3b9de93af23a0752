"""What flows into the layers of a model for real text: the covariances that `bottom_triplets` weights a spectrum with.

Legend: I = in features, N = tokens.

Each token counts alike: its x is scaled to unit length first. Without that a few tokens with activations hundreds of times
larger (the first of a text, above all) decide alone, and what is dropped hurts all the others.

Layers that are fed the same tensor (q, k and v; gate and up) share one I x I matrix. Sums, not means, are kept, so that
several processes can each see a part of the text and their parts be added up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional

from kasa.errors import SpectrumError, nearest
from kasa.folders import TENSOR_FILE, write_tensor_folder
from kasa.targets import Target

_JSON = "covariances.json"


@dataclass
class InputSums:
    """Sums of x x^T / ||x||^2 over all tokens seen, one matrix for each distinct layer input.

    Attributes:
        sums_II: name of the first layer that a tensor is fed to -> its sum, fp32.
        tokens: the same name -> how many x were summed up.
        leaders: layer name -> the name under which its input's sum is kept.
    """

    sums_II: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    _last: tuple[str, torch.Tensor] | None = None

    def add(self, name: str, x: torch.Tensor) -> None:
        """Count the input `x` (..., I) of layer `name`.

        Raises:
            SpectrumError: the layer shared its input with another one before, and does not now.
        """
        leader = self._last[0] if self._last and self._last[1] is x else name
        if self.leaders.setdefault(name, leader) != leader:
            raise SpectrumError(f"{name} is not always fed what {self.leaders[name]} is fed; calibrate it alone")
        if leader != name:
            return
        self._last = name, x
        x_NI = functional.normalize(x.detach().flatten(0, -2).float(), dim=1)
        if name not in self.sums_II:
            self.sums_II[name] = x_NI.new_zeros(x_NI.shape[1], x_NI.shape[1])
            self.tokens[name] = 0
        self.sums_II[name].addmm_(x_NI.T, x_NI)
        self.tokens[name] += len(x_NI)

    def covariance(self, name: str) -> torch.Tensor:
        """Mean of x x^T / ||x||^2 at a layer's input, I x I; zero where it saw no token."""
        leader = self.leaders[name]
        return self.sums_II[leader] / max(self.tokens[leader], 1)

    def forget_last(self) -> None:
        """Let go of the last activations."""
        self._last = None


@contextmanager
def observe_inputs(model: nn.Module, targets: Sequence[Target]) -> Iterator[InputSums]:
    """Within the block every forward pass of `model` adds to the sums. Pad nothing: each position counts as a token."""
    sums = InputSums()

    def hook_of(name: str) -> Any:
        return lambda module, inputs: sums.add(name, inputs[0])

    handles = [model.get_submodule(target.name).register_forward_pre_hook(hook_of(target.name)) for target in targets]
    try:
        yield sums
    finally:
        sums.forget_last()
        for handle in handles:
            handle.remove()


def save_sums(folder: Path, sums: InputSums) -> None:
    """Write one process's sums, complete or not at all."""
    write_tensor_folder(folder, _JSON, {"format": 1, "tokens": sums.tokens, "leaders": sums.leaders}, sums.sums_II)


class StoredCovariances:
    """The covariances over all parts that `save_sums` wrote; one matrix is read when it is asked for, and not kept."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._parts = [(folder, json.loads((folder / _JSON).read_text(encoding="utf-8"))) for folder in folders]

    def covariance(self, name: str) -> torch.Tensor:
        """Mean of x x^T / ||x||^2 at a layer's input, I x I, fp32; zero where no part saw a token.

        Raises:
            SpectrumError: no part knows the layer.
        """
        total_II: torch.Tensor | None = None
        tokens = 0
        for folder, facts in self._parts:
            if name not in facts["leaders"]:
                continue
            leader = facts["leaders"][name]
            with safe_open(folder / TENSOR_FILE, framework="pt") as file:
                part_II = file.get_tensor(leader)
            total_II = part_II if total_II is None else total_II.add_(part_II)
            tokens += facts["tokens"][leader]
        if total_II is None:
            known = {layer for _, facts in self._parts for layer in facts["leaders"]}
            raise SpectrumError(f"the calibration text never reached {name}{nearest(name, known)}")
        return total_II / max(tokens, 1)
