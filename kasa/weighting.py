"""What weights a spectrum besides the weight itself: what flows into a layer, and how the loss feels its output.

The input's side is whitened SVD (SVD-LLM, arXiv 2403.07378; CorDA, arXiv 2406.05223); both sides together are the
Kronecker-factored curvature of the loss (K-FAC, arXiv 1503.05671), in which a cut of rank R costs least.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kasa.bottom import cholesky
from kasa.errors import SpectrumError

# What is added to a covariance's diagonal, relative to its mean. Fewer tokens than features, or a feature that is always
# zero, leave directions without any energy: anything could be dropped there, though other text may need it.
SHRINKAGE = 0.01


@dataclass(frozen=True)
class Weighting:
    """How much each direction counts at a layer's input and at its output. Factors make no difference.

    Attributes:
        inputs_II: mean of x x^T over inputs x, any floating type.
        gradients_OO: mean of g g^T over the loss's gradients g at the output; None counts all outputs alike.
    """

    inputs_II: torch.Tensor
    gradients_OO: torch.Tensor | None = None

    def roots(self, weight_OI: torch.Tensor, name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(K, L), lower triangular, fp64, on the weight's device: K K^T the shrunk second moment of the gradients, L L^T
        that of the inputs, C / mean(diag C) + 0.01 I. None for one that is absent or zero.

        Raises:
            SpectrumError: one is not a floating matrix of the weight's height or width, has NaN or Inf, or has eigenvalues
                that are negative beyond the rounding of its type.
        """
        height, width = weight_OI.shape
        inputs = _root(self.inputs_II, width, "inputs", weight_OI.device, name)
        if self.gradients_OO is None:
            return None, inputs
        return _root(self.gradients_OO, height, "output gradients", weight_OI.device, name), inputs


def _root(covariance: torch.Tensor, side: int, of_what: str, device: torch.device, name: str) -> torch.Tensor | None:
    if covariance.shape != (side, side) or not covariance.is_floating_point():
        raise SpectrumError(
            f"{name}: need a floating point covariance of {side} x {side} for the weight's {of_what}, "
            f"not {covariance.dtype} of shape {tuple(covariance.shape)}"
        )
    if not torch.isfinite(covariance).all():
        raise SpectrumError(f"{name}: the covariance of its {of_what} holds NaN or Inf")
    if not covariance.any():
        return None
    mean = float(covariance.diagonal().double().mean())
    if mean <= 0:
        raise SpectrumError(f"{name}: the covariance of its {of_what} has negative eigenvalues")
    scaled = covariance.detach().to(device, torch.float64) / mean
    root = cholesky(_shrunk(scaled))
    if root is None:
        values, vectors = torch.linalg.eigh(scaled)
        # Negative eigenvalues up to the rounding of the type in which the sums were made are none.
        if values[0] < -side * torch.finfo(covariance.dtype).eps * values[-1]:
            raise SpectrumError(f"{name}: the covariance of its {of_what} has negative eigenvalues")
        root = cholesky(_shrunk((vectors * values.clamp(min=0)) @ vectors.T))
    assert root is not None
    return root


def _shrunk(scaled: torch.Tensor) -> torch.Tensor:
    return scaled + SHRINKAGE * torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
