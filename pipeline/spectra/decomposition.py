"""The spectra of single weights, each a task of its own, and of all of them together."""

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
    """One weight.

    Attributes:
        calibration: the folders with what text did in its layer; empty without them.
        inherited: the factors to take over, where there are some; then nothing is decomposed.
        leading: whether CorDA's largest components are wanted, not the smallest; needs `calibration`.
    """

    base: Path
    target: Target
    rank: int
    calibration: tuple[Path, ...]
    out: Path
    inherited: tuple[torch.Tensor, torch.Tensor] | None = None
    leading: bool = False


def decompose(piece: SpectrumTask) -> None:
    """Make the spectrum of one weight and store it."""
    torch.set_num_threads(1)
    weight = CheckpointWeights(piece.base).weight(piece.target)
    save_spectra(piece.out, {piece.target.name: _triplets(piece, weight)}, {piece.target.name: weight_digest(weight)})


def _triplets(piece: SpectrumTask, weight: torch.Tensor) -> Triplets:
    if piece.inherited is not None:
        return inherited_triplets(weight, *piece.inherited)
    weighting = StoredCalibration(piece.calibration).weighting(piece.target.name) if piece.calibration else None
    if piece.leading:
        assert weighting is not None
        return leading_triplets(weight, piece.rank, piece.target.name, weighting)
    return bottom_triplets(weight, piece.rank, piece.target.name, weighting)


def inherited_factors(adapter: SavedAdapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """U_d S_d and V_d^T of every layer by its name; without columns and rows where it drops nothing."""
    found = {}
    for target in adapter.targets:
        left_OD = adapter.dropped.get(f"{target.name}.dropped_left", torch.zeros(target.out_features, 0))
        right_DI = adapter.dropped.get(f"{target.name}.dropped_right", torch.zeros(0, target.in_features))
        found[target.name] = left_OD, right_DI
    return found


def combine(pieces: Sequence[SpectrumTask], folder: Path) -> dict[str, Any]:
    """Bring the spectra of all weights together in one folder; returns the facts."""
    triplets: dict[str, Triplets] = {}
    digests: dict[str, str] = {}
    for piece in pieces:
        one, digest = load_spectra(piece.out)
        triplets |= one
        digests |= digest
    save_spectra(folder, triplets, digests)
    methods = [spectrum.method for spectrum in triplets.values()]
    return {
        "weights": len(triplets),
        "worst_residual": max(spectrum.residual for spectrum in triplets.values()),
        "methods": {method: methods.count(method) for method in sorted(set(methods))},
    }
