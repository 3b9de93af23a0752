"""Decomposition of single weights, each a task of its own, and the combination of all spectra in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kasa import CheckpointWeights
from kasa.bottom import Operand, spectral_norm
from kasa.calibration import StoredCalibration
from kasa.checkpoint import weight_digest
from kasa.errors import SpectrumError
from kasa.spectra import Triplets, bottom_triplets, inherited_triplets, stored
from kasa.spectra_file import load_spectra, save_spectra
from kasa.targets import Target
from kasa.weighting import Weighting

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
        leading: whether the components that count most for the text are wanted, not those that count least; needs
            `calibration`.
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


def leading_triplets(weight_OI: torch.Tensor, rank: int, name: str, weighting: Weighting) -> Triplets:
    """The `rank` components of a weight W that count most for the text that C, the inputs' second moment, was observed on.

    With W C = U S V^T they are the largest triplets U S V^T C^-1, largest first: what CorDA (arXiv 2406.05223) calls
    instruction-previewed and PEFT offers as `ipm`. As U^T W C = S V^T, that is U U^T W, so no inverse is needed. C is that of
    `kasa.calibration`, in which every token counts alike whatever its norm, scaled to a mean diagonal of 1 and shrunk as PEFT
    does it; PEFT scales the inputs by the largest of each sample instead. With white inputs the result is PiSSA's.

    Legend: O = out features, I = in features, R = rank, K = min(O, I), L = max(O, I).

    Returns:
        Triplets in fp32 on the CPU, computed in fp64.

    Raises:
        SpectrumError: the weight or C holds NaN or Inf, or C is not of the weight's width or has negative eigenvalues.
    """
    if not torch.isfinite(weight_OI).all():
        raise SpectrumError(f"{name}: the weight holds NaN or Inf; the checkpoint is damaged")
    weight_OI = weight_OI.detach().double()
    root_II = weighting.roots(weight_OI, name)[1]
    product_OI = weight_OI if root_II is None else weight_OI @ root_II @ root_II.T
    tall = product_OI.shape[0] > product_OI.shape[1]
    short_KL = product_OI.T if tall else product_OI
    energies_K, vectors_KK = torch.linalg.eigh(short_KL @ short_KL.T)
    short_KR = vectors_KK[:, -rank:].flip(1)
    values_R = energies_K[-rank:].flip(0).clamp(min=0).sqrt()
    # A weight of a smaller rank has singular values of 0; the vectors that they would divide are 0 as well.
    divisors_R = values_R.clamp(min=torch.finfo(values_R.dtype).eps * float(values_R[0]) or 1.0)
    long_RL = (short_KR.T @ short_KL) / divisors_R[:, None]
    left_OR = long_RL.T if tall else short_KR
    errors_R = (short_KL @ long_RL.T - short_KR * values_R).norm(dim=0)
    scale = float(values_R[0] * values_R.norm()) or 1.0
    return Triplets(
        left_OR=stored(left_OR),
        singular_values_R=stored(values_R),
        right_RI=stored((left_OR.T @ weight_OI) / divisors_R[:, None]),
        largest=spectral_norm(Operand(weight_OI)),
        residual=float((values_R * errors_R).max()) / scale,
        orthogonality=float((short_KR.T @ short_KR - torch.eye(rank).to(short_KR)).abs().max()),
        method="eigensolver",
    )


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
