"""KaSA's two regularisers, for all layers in a few batched operations.

    L2 = sum_j d_j^2,    L3 = ||B^T B - I_r||_F + ||A A^T - I_r||_F        (per layer; arXiv 2412.06071, section 3.3)

Two conventions exist, and the published weights beta and gamma belong to the second:
- `paper`: r x r Gram matrices, summed over the layers (as in Hugging Face PEFT 0.21.2);
- `authors`: I x I and O x O Gram matrices, averaged over the layers (github.com/juyongjiang/KaSA @ f85e88c). The large
  matrices are never formed: ||A^T A - I_in||_F^2 = ||A A^T - I_r||_F^2 + (in - r); the same for B with out.

Gradients, by hand, of n = sqrt(||G - I||_F^2 + c): dn/dA = 2 (G - I) A / n for G = A A^T, dn/dB = 2 B (G - I) / n for
G = B^T B; 0 where n = 0. Layers of one shape share each product, forwards and backwards.

Legend: L = layers of one shape, R = rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kasa.config import KasaConfig, Regulariser
from kasa.errors import KasaError
from kasa.layer import KasaLayer


@dataclass(frozen=True)
class Penalty:
    """Both regularisers, unweighted, as scalars that can be differentiated once; fp32, or fp64 if the adapter is."""

    singular_value: torch.Tensor
    orthogonality: torch.Tensor

    def weighted(self, config: KasaConfig) -> torch.Tensor:
        """beta * L2 + gamma * L3."""
        return config.singular_value_weight * self.singular_value + config.orthogonality_weight * self.orthogonality


def penalty(layers: Iterable[KasaLayer], convention: Regulariser) -> Penalty:
    """L2 and L3 over the active updates of `layers`.

    Under ZeRO-3 the layers' tensors must be gathered, through the backward pass too.

    Raises:
        KasaError: no layer has an active update.
    """
    updates = [update for layer in layers if (update := layer.update) is not None]
    if not updates:
        raise KasaError("there is nothing to regularise: no adapter is active")
    tensors = [update.a for update in updates] + [update.b for update in updates] + [update.d for update in updates]
    singular_value, orthogonality = _Regularisers.apply(convention, *tensors)
    layer_count = len(updates) if convention == "authors" else 1
    return Penalty(singular_value / layer_count, orthogonality / layer_count)


@dataclass(frozen=True)
class _Group:
    """Matrices of one shape: where they stand among the inputs, and 2 (G - I) / n of each; None for the vectors d."""

    indices: list[int]
    slope_LRR: torch.Tensor | None = None
    rows: bool = False


class _Regularisers(torch.autograd.Function):
    """(convention, every A, every B, every d) -> (sum of squares of d, sum of norms)."""

    @staticmethod
    def forward(ctx: Any, convention: Regulariser, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(tensors) // 3
        first = tensors[0]
        # Not the stacks: memory of that size is slower to come by than a second copy into it.
        ctx.save_for_backward(*tensors)
        ctx.groups = groups = []
        squares, norms = [], []
        with torch.autocast(first.device.type, enabled=False):
            for indices in _by_shape(tensors, 2 * count, 3 * count):
                vectors = _stacked(tensors, indices)
                squares.append(vectors.square().sum().to(first.device))
                groups.append(_Group(indices))
            for rows, start in ((True, 0), (False, count)):
                for indices in _by_shape(tensors, start, start + count):
                    matrices = _stacked(tensors, indices)
                    norms_L, slope_LRR = _norms(matrices, rows, convention)
                    norms.append(norms_L.sum().to(first.device))
                    groups.append(_Group(indices, slope_LRR, rows))
        return torch.stack(squares).sum(), torch.stack(norms).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        outer_square, outer_norm = outer
        tensors = ctx.saved_tensors
        gradients: list[torch.Tensor | None] = [None] * len(tensors)
        with torch.autocast(outer_square.device.type, enabled=False):
            for group in ctx.groups:
                values = _stacked(tensors, group.indices)
                if group.slope_LRR is None:
                    product = values * (2 * outer_square.to(values.device))
                else:
                    slope_LRR = group.slope_LRR * outer_norm.to(values.device)
                    product = slope_LRR @ values if group.rows else values @ slope_LRR
                product = product.to(tensors[group.indices[0]].dtype)
                for index, gradient in zip(group.indices, product.unbind(), strict=True):
                    gradients[index] = gradient
        return None, *gradients


def _by_shape(tensors: Sequence[torch.Tensor], start: int, end: int) -> Iterable[list[int]]:
    groups: dict[Any, list[int]] = {}
    for index in range(start, end):
        tensor = tensors[index]
        groups.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(index)
    return groups.values()


def _stacked(tensors: Sequence[torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
    stacked = torch.stack([tensors[index] for index in indices])
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32))


def _norms(matrices: torch.Tensor, rows: bool, convention: Regulariser) -> tuple[torch.Tensor, torch.Tensor]:
    """n of each matrix, shape (L,), and 2 (G - I) / n, shape (L, R, R)."""
    gram_LRR = matrices @ matrices.mT if rows else matrices.mT @ matrices
    gram_LRR.diagonal(dim1=1, dim2=2).sub_(1)
    squares_L = gram_LRR.square().sum(dim=(1, 2))
    if convention == "authors":
        squares_L += abs(matrices.shape[1] - matrices.shape[2])
    norms_L = squares_L.sqrt()
    factors_L = torch.where(norms_L > 0, 2 / norms_L, 0.0)
    return norms_L, gram_LRR.mul_(factors_L[:, None, None])
