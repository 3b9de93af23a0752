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

# A stack of this size stays in the cache of a CPU core from product to product.
_CACHE_BYTES = 2**20


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


class _Regularisers(torch.autograd.Function):
    """(convention, every A, every B, every d) -> (sum of squares of d, sum of norms)."""

    @staticmethod
    def forward(ctx: Any, convention: Regulariser, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count, device = len(tensors) // 3, tensors[0].device
        # Not the stacks: memory of that size is slower to come by than a second copy into it.
        ctx.save_for_backward(*tensors)
        ctx.rows = _batches(tensors, 0, count)
        ctx.columns = _batches(tensors, count, 2 * count)
        ctx.vectors = _batches(tensors, 2 * count, 3 * count)
        squares, norms = [], []
        ctx.deviations = []
        with torch.autocast(device.type, enabled=False):
            for batch in ctx.rows + ctx.columns:
                matrices = _stacked(tensors, batch)
                gram_LRR = matrices @ matrices.mT if batch[0] < count else matrices.mT @ matrices
                gram_LRR.diagonal(dim1=1, dim2=2).sub_(1)
                ctx.deviations.append(gram_LRR)
                excess = abs(matrices.shape[1] - matrices.shape[2]) if convention == "authors" else 0
                norms.append((gram_LRR.square().sum(dim=(1, 2)) + excess).to(device))
            for batch in ctx.vectors:
                squares.append(_stacked(tensors, batch).square().sum().to(device))
            ctx.norms = torch.cat(norms).sqrt_()
        return torch.stack(squares).sum(), ctx.norms.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        outer_square, outer_norm = outer
        tensors = ctx.saved_tensors
        gradients: list[torch.Tensor | None] = [None] * len(tensors)
        with torch.autocast(outer_norm.device.type, enabled=False):
            factors = torch.where(ctx.norms > 0, 2 * outer_norm / ctx.norms, 0.0)
            factors_L = factors.split([len(batch) for batch in ctx.rows + ctx.columns])
            for index, batch in enumerate(ctx.rows + ctx.columns):
                matrices = _stacked(tensors, batch)
                slope_LRR = ctx.deviations[index] * factors_L[index].to(matrices)[:, None, None]
                product = slope_LRR @ matrices if index < len(ctx.rows) else matrices @ slope_LRR
                _spread(product.to(tensors[batch[0]].dtype), batch, gradients)
            for batch in ctx.vectors:
                vectors = _stacked(tensors, batch)
                _spread((vectors * (2 * outer_square).to(vectors)).to(tensors[batch[0]].dtype), batch, gradients)
        return None, *gradients


def _batches(tensors: Sequence[torch.Tensor], start: int, end: int) -> list[list[int]]:
    """Indices of tensors that can be stacked; on a CPU no more of them than its cache holds."""
    by_kind: dict[Any, list[int]] = {}
    for index in range(start, end):
        tensor = tensors[index]
        by_kind.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(index)
    batches = []
    for (shape, dtype, device), indices in by_kind.items():
        size = max(1, _CACHE_BYTES // (shape.numel() * dtype.itemsize)) if device.type == "cpu" else len(indices)
        batches += [indices[first : first + size] for first in range(0, len(indices), size)]
    return batches


def _stacked(tensors: Sequence[torch.Tensor], batch: Sequence[int]) -> torch.Tensor:
    stacked = torch.stack([tensors[index] for index in batch])
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32))


def _spread(product: torch.Tensor, batch: Sequence[int], gradients: list[torch.Tensor | None]) -> None:
    for index, gradient in zip(batch, product.unbind(), strict=True):
        gradients[index] = gradient
