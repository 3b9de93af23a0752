"""What real text does in the layers of a model: the second moments that a `Weighting` of a spectrum is made of.

Legend: I = in features, O = out features, N = tokens.

Each token counts alike: its x, and its gradient g, are scaled to unit length first. Without that a few tokens with
activations hundreds of times larger (the first of a text, above all) decide alone, and what is dropped hurts all the others.

Layers that are fed the same tensor (q, k and v; gate and up) share one I x I matrix. Gradients are observed only where
O <= I, so that their matrices never take more memory than those of the inputs. Sums, not means, are kept, so that several
processes can each see a part of the text and their parts be added up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional

from kasa.errors import SpectrumError, nearest
from kasa.files import read_sealed_json
from kasa.folders import TENSOR_FILE, write_tensor_folder
from kasa.targets import Target
from kasa.weighting import Weighting

CALIBRATION_JSON = "calibration.json"
_INPUT, _GRADIENT = "input/", "gradient/"


@dataclass
class CalibrationSums:
    """Sums over all tokens seen, fp32.

    Attributes:
        inputs_II: name of the first layer that a tensor is fed to -> sum of x x^T / ||x||^2.
        gradients_OO: layer name -> sum of g g^T / ||g||^2.
        leaders: layer name -> the name under which its input's sum is kept.
    """

    inputs_II: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients_OO: dict[str, torch.Tensor] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    _last: tuple[str, torch.Tensor] | None = None

    def add_input(self, name: str, x: torch.Tensor) -> None:
        """Count the input `x` (..., I) of layer `name`.

        Raises:
            SpectrumError: the layer shared its input with another one before, and does not now.
        """
        leader = self._last[0] if self._last and self._last[1] is x else name
        if self.leaders.setdefault(name, leader) != leader:
            raise SpectrumError(f"{name} is not always fed what {self.leaders[name]} is fed; calibrate it alone")
        if leader == name:
            self._last = name, x
            _add(self.inputs_II, name, x)

    def add_gradient(self, name: str, g: torch.Tensor) -> None:
        """Count the loss's gradient `g` (..., O) at the output of layer `name`."""
        _add(self.gradients_OO, name, g)

    def weighting(self, name: str) -> Weighting:
        """What the tokens seen so far say about a layer.

        Raises:
            SpectrumError: the layer saw none.
        """
        if name not in self.leaders:
            raise _unseen(name, self.leaders)
        return Weighting(self.inputs_II[self.leaders[name]], self.gradients_OO.get(name))

    def forget_last(self) -> None:
        """Let go of the last activations."""
        self._last = None


@contextmanager
def observe_layers(model: nn.Module, targets: Sequence[Target], gradients: bool = False) -> Iterator[CalibrationSums]:
    """Within the block every forward pass of `model` adds to the sums, and with `gradients` every backward pass.

    Pad nothing: each position counts as a token. With `gradients` parameters collect none within the block, whatever they
    do outside it; the sum or mean of the loss over the tokens, backward, is all that is wanted.
    """
    sums = CalibrationSums()
    handles = []
    for target in targets:
        module = model.get_submodule(target.name)
        handles.append(module.register_forward_pre_hook(_input_hook(sums, target.name)))
        if gradients and target.out_features <= target.in_features:
            handles.append(module.register_forward_hook(_output_hook(sums, target.name)))
    trained = [parameter for parameter in model.parameters() if gradients and parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield sums
    finally:
        sums.forget_last()
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def save_sums(folder: Path, sums: CalibrationSums) -> None:
    """Write one process's sums, complete or not at all."""
    tensors = {f"{_INPUT}{name}": total for name, total in sums.inputs_II.items()}
    tensors |= {f"{_GRADIENT}{name}": total for name, total in sums.gradients_OO.items()}
    facts = {"format": 2, "leaders": sums.leaders, "gradients": sorted(sums.gradients_OO)}
    write_tensor_folder(folder, CALIBRATION_JSON, facts, tensors)


class StoredCalibration:
    """The sums of all parts that `save_sums` wrote; a matrix is read when it is asked for, and not kept."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._parts = [(folder, read_sealed_json(folder / CALIBRATION_JSON)) for folder in folders]

    def weighting(self, name: str) -> Weighting:
        """What all parts together say about a layer.

        Raises:
            SpectrumError: none saw it.
        """
        inputs = [
            (folder, _INPUT + facts["leaders"][name]) for folder, facts in self._parts if name in facts["leaders"]
        ]
        if not inputs:
            raise _unseen(name, {layer for _, facts in self._parts for layer in facts["leaders"]})
        gradients = [(folder, _GRADIENT + name) for folder, facts in self._parts if name in facts["gradients"]]
        return Weighting(_total(inputs), _total(gradients) if gradients else None)


def _input_hook(sums: CalibrationSums, name: str) -> Any:
    return lambda module, inputs: sums.add_input(name, inputs[0])


def _output_hook(sums: CalibrationSums, name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if not torch.is_grad_enabled():
            raise SpectrumError(
                f"{name}: gradients are to be observed, but the forward pass runs without any (no_grad)"
            )
        # The first layers of a frozen model: nothing before them asks for a gradient.
        if not output.requires_grad:
            output.requires_grad_(True)
        output.register_hook(lambda g: sums.add_gradient(name, g))

    return hook


def _add(sums: dict[str, torch.Tensor], name: str, rows: torch.Tensor) -> None:
    """Add the outer products of the rows (..., D), at unit length, to a sum; a row of zeros adds nothing."""
    rows_ND = functional.normalize(rows.detach().flatten(0, -2).float(), dim=1)
    if name not in sums:
        sums[name] = rows_ND.new_zeros(rows_ND.shape[1], rows_ND.shape[1])
    sums[name].addmm_(rows_ND.T, rows_ND)


def _total(stored: Sequence[tuple[Path, str]]) -> torch.Tensor:
    total: torch.Tensor | None = None
    for folder, key in stored:
        with safe_open(folder / TENSOR_FILE, framework="pt") as file:
            part = file.get_tensor(key)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _unseen(name: str, known: Collection[str]) -> SpectrumError:
    return SpectrumError(f"the calibration text never reached {name}{nearest(name, known)}")
