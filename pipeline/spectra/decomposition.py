"""Decomposition of single weights, each a task of its own, and the combination of all spectra in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kasa import CheckpointWeights
from kasa.calibration import StoredCalibration
from kasa.checkpoint import weight_digest
from kasa.spectra import Triplets, bottom_triplets, inherited_triplets
from kasa.spectra_file import load_spectra, save_spectra
from kasa.targets import Target
from pipeline.methods.residual import leading_triplets

if TYPE_CHECKING:
    from kasa.adapter_file import SavedAdapter


@dataclass(frozen=True)
class SpectrumTask:
    """The decomposition of one weight.

    Attributes:
        base: folder of the base model.
        target: the weight.
        rank: number of singular triplets.
        calibration: the folders with the layer's second moments; empty for an unweighted decomposition.
        out: folder to write.
        inherited: factors to take over from an adapter; nothing is decomposed then.
        leading: whether CorDA's largest components are wanted instead of the smallest; needs `calibration`.
    """

    base: Path
    target: Target
    rank: int
    calibration: tuple[Path, ...]
    out: Path
    inherited: tuple[torch.Tensor, torch.Tensor] | None = None
    leading: bool = False


def decompose(task: SpectrumTask) -> None:
    """Compute the spectrum of one weight and store it."""
    torch.set_num_threads(1)
    weight = CheckpointWeights(task.base).weight(task.target)
    save_spectra(task.out, {task.target.name: _triplets(task, weight)}, {task.target.name: weight_digest(weight)})


def _triplets(task: SpectrumTask, weight: torch.Tensor) -> Triplets:
    if task.inherited is not None:
        return inherited_triplets(weight, *task.inherited)
    weighting = StoredCalibration(task.calibration).weighting(task.target.name) if task.calibration else None
    if task.leading:
        assert weighting is not None, "the recipe calibrates what CorDA decomposes"
        return leading_triplets(weight, task.rank, task.target.name, weighting)
    return bottom_triplets(weight, task.rank, task.target.name, weighting)


def inherited_factors(adapter: SavedAdapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors U_d S_d (O, D) and V_d^T (D, I) that an adapter drops from each layer, by the layer's name; D may be 0."""
    found = {}
    for target in adapter.targets:
        left_OD = adapter.dropped.get(f"{target.name}.dropped_left", torch.zeros(target.out_features, 0))
        right_DI = adapter.dropped.get(f"{target.name}.dropped_right", torch.zeros(0, target.in_features))
        found[target.name] = left_OD, right_DI
    return found


def combine(tasks: Sequence[SpectrumTask], folder: Path) -> dict[str, Any]:
    """Combine the spectra of all weights in one folder.

    Returns:
        The number of `weights`, the `worst_residual`, and how many weights each of the `methods` decomposed.
    """
    triplets: dict[str, Triplets] = {}
    digests: dict[str, str] = {}
    for task in tasks:
        spectrum, digest = load_spectra(task.out)
        triplets |= spectrum
        digests |= digest
    save_spectra(folder, triplets, digests)
    methods = [spectrum.method for spectrum in triplets.values()]
    return {
        "weights": len(triplets),
        "worst_residual": max(spectrum.residual for spectrum in triplets.values()),
        "methods": {method: methods.count(method) for method in sorted(set(methods))},
    }
