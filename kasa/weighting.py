"""The covariance of a layer's input as a weighting of its spectrum (SVD-LLM, arXiv 2403.07378; CorDA, arXiv 2406.05223).

Legend: O = out features, I = in features.
"""

from __future__ import annotations

import torch

from kasa.bottom import cholesky
from kasa.errors import SpectrumError

# What is added to a covariance's diagonal, relative to its mean. Fewer tokens than features, or a feature that is always
# zero, leave directions without any energy: anything could be dropped there, though other text may need it.
SHRINKAGE = 0.01


def covariance_root(covariance_II: torch.Tensor, weight_OI: torch.Tensor, name: str) -> torch.Tensor | None:
    """L of shape (I, I), lower triangular, fp64, with L L^T = C / mean(diag C) + 0.01 I; None for a covariance of zeros.

    Raises:
        SpectrumError: C is not a floating matrix of the weight's width, has NaN or Inf, or has eigenvalues that are
            negative beyond the rounding of its type.
    """
    width = weight_OI.shape[1]
    if covariance_II.shape != (width, width) or not covariance_II.is_floating_point():
        raise SpectrumError(
            f"{name}: need a floating point covariance of {width} x {width}, the weight's inputs, "
            f"not {covariance_II.dtype} of shape {tuple(covariance_II.shape)}"
        )
    mean = float(covariance_II.diagonal().double().mean())
    if not torch.isfinite(covariance_II).all():
        raise SpectrumError(f"{name}: the covariance of its inputs holds NaN or Inf")
    if not covariance_II.any():
        return None
    if mean <= 0:
        raise SpectrumError(f"{name}: the covariance of its inputs has negative eigenvalues")
    scaled_II = covariance_II.detach().to(weight_OI.device, torch.float64) / mean
    root_II = cholesky(_shrunk(scaled_II))
    if root_II is None:
        rounding = width * torch.finfo(covariance_II.dtype).eps
        root_II = cholesky(_shrunk(_without_negative(scaled_II, rounding, name)))
    assert root_II is not None
    return root_II


def _shrunk(scaled_II: torch.Tensor) -> torch.Tensor:
    return scaled_II + SHRINKAGE * torch.eye(len(scaled_II), dtype=scaled_II.dtype, device=scaled_II.device)


def _without_negative(scaled_II: torch.Tensor, rounding: float, name: str) -> torch.Tensor:
    """The covariance with eigenvalues that are negative by no more than `rounding`, of the largest, set to zero."""
    values_I, vectors_II = torch.linalg.eigh(scaled_II)
    if values_I[0] < -rounding * values_I[-1]:
        raise SpectrumError(f"{name}: the covariance of its inputs has negative eigenvalues")
    return (vectors_II * values_I.clamp(min=0)) @ vectors_II.T
