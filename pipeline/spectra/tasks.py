"""What the driver hands to the workers of the spectra and audit stages, and the memory that a task reserves.

The driver imports this module, so it must not import torch.

Legend: O = out features, I = in features, K = min(O, I).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kasa.config import KasaConfig
from kasa.targets import Target
from pipeline.config.recipe import Weighted

if TYPE_CHECKING:
    import torch

# A worker process with torch and this package loaded.
_PROCESS_BYTES = 2**29
# Bytes per element of a covariance: kept in fp32 and its root in fp64; several fp64 copies exist while the root is computed.
_KEPT_BYTES, _ROOTED_BYTES = 4 + 8, 30
# Bytes per element of K x K: the Gram matrix in fp64, its factor, and the Krylov space, which may span a third of it.
_GRAM_BYTES = 8 + 8 + 4


@dataclass(frozen=True)
class CalibrationShard:
    """One worker's share of the calibration text: the rows `index`, `index + count`, ... of the first `tokens` tokens.

    Attributes:
        base_folder: the base model.
        prepared: folder of the prepared data.
        precision: `fp32` or `bf16`.
        targets: the layers to observe.
        tokens: length of the calibration text.
        gradients: whether the second moments of output gradients are summed up too, beside those of the inputs.
        index: number of this shard.
        count: how many shards there are.
        out: file for the sums.
        journal: file for the progress.
    """

    base_folder: Path
    prepared: Path
    precision: str
    targets: tuple[Target, ...]
    tokens: int
    gradients: bool
    index: int
    count: int
    out: Path
    journal: Path


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


@dataclass(frozen=True)
class AuditJob:
    """The comparison of the base with the truncated base, on the first `tokens` held-out tokens.

    Attributes:
        base_folder: the base model.
        prepared: folder of the prepared data.
        precision: `fp32` or `bf16`.
        spectra: folder of the spectra.
        targets: the layers that are truncated.
        config: how they are truncated.
        tokens: length of the text.
        out: JSON file for the result.
        journal: file for the progress.
    """

    base_folder: Path
    prepared: Path
    precision: str
    spectra: Path
    targets: tuple[Target, ...]
    config: KasaConfig
    tokens: int
    out: Path
    journal: Path


def decomposition_bytes(target: Target, element_bytes: int, weighted: Weighted) -> int:
    """Peak memory of a decomposition in bytes, its process included.

    A full SVD, the rare last resort, needs more.

    Args:
        target: the weight.
        element_bytes: of the stored weight.
        weighted: which covariances take part: none, that of the inputs, or that of the output gradients as well. Layers
            with O > I do without the latter (see `kasa.calibration`).
    """
    size = target.out_features * target.in_features
    smaller = min(target.out_features, target.in_features) ** 2
    inputs = 0 if weighted == "no" else target.in_features**2
    gradients = target.out_features**2 if weighted == "both" and target.out_features <= target.in_features else 0
    # Bytes per element of O x I: the weight in fp64, and the product with the covariances' roots.
    copies = 8 if weighted == "no" else 16
    stages = (
        _ROOTED_BYTES * inputs,
        _KEPT_BYTES * inputs + _ROOTED_BYTES * gradients,
        _KEPT_BYTES * (inputs + gradients) + copies * size + _GRAM_BYTES * smaller,
    )
    return _PROCESS_BYTES + element_bytes * size + max(stages)
