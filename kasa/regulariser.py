"""KaSA's two regularisers, for all layers in a few batched operations.

    L2 = sum_j d_j^2,    L3 = ||B^T B - I_r||_F + ||A A^T - I_r||_F        (per layer; arXiv 2412.06071, section 3.3)

Two conventions exist, and the published weights beta and gamma belong to the second:
- `paper`: r x r Gram matrices, summed over the layers (as in Hugging Face PEFT 0.21.2);
- `authors`: I x I and O x O Gram matrices, averaged over the layers (github.com/juyongjiang/KaSA @ f85e88c). The large
  matrices are never formed: ||A^T A - I_in||_F^2 = ||A A^T - I_r||_F^2 + (in - r), likewise for B with out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kasa.config import KasaConfig, Regulariser
from kasa.layer import KasaLayer


@dataclass(frozen=True)
class Penalty:
    """Both regularisers, unweighted, as fp32 scalars with gradients."""

    singular_value: torch.Tensor
    orthogonality: torch.Tensor

    def weighted(self, config: KasaConfig) -> torch.Tensor:
        """beta * L2 + gamma * L3."""
        return config.singular_value_weight * self.singular_value + config.orthogonality_weight * self.orthogonality


def penalty(layers: Iterable[KasaLayer], convention: Regulariser) -> Penalty:
    """L2 and L3 over `layers`. Under ZeRO-3 the layers' tensors must be gathered, through the backward pass too."""
    layers = list(layers)
    singular_value = torch.stack([layer.d for layer in layers]).float().square().sum()
    # (r, n) matrices with rows to be orthonormal: A as it is, B transposed.
    by_shape: defaultdict[torch.Size, list[torch.Tensor]] = defaultdict(list)
    for layer in layers:
        by_shape[layer.a.shape].append(layer.a)
        by_shape[layer.b.T.shape].append(layer.b.T)
    orthogonality = torch.stack([_deviation(torch.stack(group), convention).sum() for group in by_shape.values()]).sum()
    layer_count = len(layers) if convention == "authors" else 1
    return Penalty(singular_value / layer_count, orthogonality / layer_count)


def _deviation(matrices_LRN: torch.Tensor, convention: Regulariser) -> torch.Tensor:
    """Frobenius norms of M M^T - I (or of M^T M - I, by the identity above), one for each matrix."""
    matrices_LRN = matrices_LRN.float()
    rank, length = matrices_LRN.shape[1:]
    gram_LRR = matrices_LRN @ matrices_LRN.transpose(1, 2)
    deviation_L = (gram_LRR - torch.eye(rank, device=gram_LRR.device)).square().sum(dim=(1, 2))
    if convention == "authors":
        deviation_L = deviation_L + (length - rank)
    return deviation_L.sqrt()
