"""The smallest singular triplets of a weight: what KaSA's truncation drops (arXiv 2412.06071, section 3.1).

Legend: O = out features, I = in features, R = rank, K = min(O, I), L = max(O, I).

Only a basis of the bottom subspace on the shorter side is needed, and that is an eigenproblem of the K x K Gram matrix,
far cheaper than a full SVD (`kasa.bottom`). The Gram matrix squares the condition number, so it is formed in fp64, and
every result is checked; where a check fails, the next slower method takes over, down to a full fp64 SVD.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kasa.bottom import Operand, by_eigensolver, by_lanczos, gram_norm, is_complete, spectral_norm
from kasa.errors import SpectrumError
from kasa.truncation import LANCZOS_FROM
from kasa.weighting import Weighting

RESIDUAL_LIMIT = 1e-9
# Of the dropped energy, for what was found through a Gram matrix: together with as much for what may have been missed
# (`kasa.bottom.PROOF_SLACK`), 1e-6 of the dropped part's norm.
ENERGY_LIMIT = 1e-6
# Of the largest singular value: a dropped part below it is as good as nothing, however inexact.
NOTHING = 1e-12


@dataclass(frozen=True)
class Triplets:
    """The R smallest singular triplets of W, or of M = K^T W L under a weighting (`kasa.weighting`), smallest first, so that
    a prefix serves every smaller rank. (Who wants others of a weight keeps them in the same form.)

    With M's triplets (u, s, v), the part of the weight that is dropped is the sum of s (K^-T u) (v^T L^-1). Of all parts
    whose removal lowers the rank by R it is the smallest as the weighting counts: with K = I it changes the layer's
    output least, with K and L both, the loss.

    The Frobenius norm of the dropped part of M exceeds the least possible by no more than 1e-6 of itself or 1e-12 of M's
    largest singular value. What that rests on, by method:

    - `lanczos`: block Lanczos on the inverse. Its residuals bound how far the sum of s^2 is above that of the R singular
      values nearest by; that no smaller one was missed is proved by a Cholesky factorisation, up to the rounding of the
      Gram matrix (`kasa.bottom.is_complete`).
    - `eigensolver`: LAPACK's eigensolver and the same residuals. That it misses none is taken on trust.
    - `svd`: a full fp64 SVD, taken on trust. For what the others cannot do: a dropped part too small beside the largest
      for a Gram matrix, which squares the ratio.

    Attributes:
        left_OR: left singular vectors u, columns of unit length; K^-T u under a weighting.
        singular_values_R: of M, ascending.
        right_RI: v^T, rows of unit length; v^T L^-1 under a weighting.
        largest: the largest singular value (spectral norm) of W, to two digits.
        residual: max over triplets of s ||M v - s u|| (M wide) or s ||M^T u - s v|| (M tall), relative to M's largest
            singular value and the norm of all s; 0 for a dropped part below 1e-12 of M's largest. The residual of the other
            side vanishes by construction. Measured before storing in fp32.
        orthogonality: max deviation of the vectors' inner products on the shorter side from the identity.
        method: `lanczos`, `eigensolver` or `svd`.
    """

    left_OR: torch.Tensor
    singular_values_R: torch.Tensor
    right_RI: torch.Tensor
    largest: float
    residual: float
    orthogonality: float
    method: str

    def dropped_factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(U_d S_d, V_d^T) of shapes (O, rank) and (rank, I), whose product is the part that is dropped."""
        return self.left_OR[:, :rank] * self.singular_values_R[:rank], self.right_RI[:rank]


# What an adapter and a report need: layer name -> its triplets.
Spectra = Mapping[str, Triplets]


def bottom_triplets(
    weight_OI: torch.Tensor, rank: int, name: str = "weight", weighting: Weighting | None = None
) -> Triplets:
    """The `rank` smallest singular triplets of `weight_OI`, computed in fp64 where the weight is, returned in fp32 on the CPU.

    Args:
        weight_OI: any floating type, square, tall or wide, on the CPU or a CUDA device.
        rank: R, between 1 and K.
        name: names the weight in errors.
        weighting: weights the spectrum; None, or a weighting of zeros, weights nothing.

    Raises:
        SpectrumError: the weight is not a floating matrix, has NaN or Inf, or `rank` is out of range; the weighting
            has another shape, NaN, Inf or negative eigenvalues.
    """
    _check(weight_OI, rank, name)
    matrix_OI = weight_OI.detach()
    left_root_OO, right_root_II = (None, None) if weighting is None else weighting.roots(weight_OI, name)
    if right_root_II is not None:
        matrix_OI = matrix_OI.double() @ right_root_II
    if left_root_OO is not None:
        matrix_OI = left_root_OO.T @ matrix_OI.double()
    tall = matrix_OI.shape[0] > matrix_OI.shape[1]
    short = _short_triplets(matrix_OI.T if tall else matrix_OI, rank, name)
    left_OR, right_RI = (short.right_RI.T, short.left_OR.T) if tall else (short.left_OR, short.right_RI)
    if right_root_II is not None:
        right_RI = torch.linalg.solve_triangular(right_root_II, right_RI, upper=False, left=False)
    if left_root_OO is not None:
        left_OR = torch.linalg.solve_triangular(left_root_OO.T, left_OR, upper=True)
    return replace(
        short,
        largest=short.largest if weighting is None else spectral_norm(Operand(weight_OI.detach())),
        left_OR=stored(left_OR),
        singular_values_R=stored(short.singular_values_R),
        right_RI=stored(right_RI),
    )


def inherited_triplets(weight_OI: torch.Tensor, left_OD: torch.Tensor, right_DI: torch.Tensor) -> Triplets:
    """The triplets behind U_d S_d and V_d^T, which an adapter saved of the weight's: `dropped_factors` gives them back, up
    to a rounding. Without a weighting these are the triplets themselves, under one only their sum is the same.
    """
    values_D = left_OD.norm(dim=0)
    return Triplets(
        left_OR=stored(left_OD / values_D.clamp(min=torch.finfo(left_OD.dtype).tiny)),
        singular_values_R=stored(values_D),
        right_RI=stored(right_DI),
        largest=spectral_norm(Operand(weight_OI.detach())),
        # Nothing was computed that could be off.
        residual=0.0,
        orthogonality=0.0,
        method="inherited",
    )


def _check(weight_OI: torch.Tensor, rank: int, name: str) -> None:
    if weight_OI.ndim != 2 or not weight_OI.is_floating_point():
        raise SpectrumError(
            f"{name}: need a floating point matrix, not {weight_OI.dtype} of shape {tuple(weight_OI.shape)}"
        )
    smaller_side = min(weight_OI.shape)
    if not 1 <= rank <= smaller_side:
        raise SpectrumError(f"{name}: rank {rank} is not between 1 and {smaller_side}, the smaller side of the weight")


def _short_triplets(short_KL: torch.Tensor, rank: int, name: str) -> Triplets:
    """The triplets of a matrix that is not tall, in fp64 on its device, by the first method whose checks hold."""
    operand = Operand(short_KL)
    gram_KK = operand.gram()
    # NaN and Inf anywhere reach the diagonal; a search through the weight itself would cost more than its conversion.
    if not torch.isfinite(gram_KK.trace()):
        raise SpectrumError(f"{name}: the weight holds NaN or Inf; the checkpoint is damaged")
    largest = gram_norm(gram_KK) ** 0.5
    triplets = None
    if len(gram_KK) >= LANCZOS_FROM:
        triplets = _by_lanczos(operand, gram_KK, rank, largest)
        if triplets is None:
            gram_KK = operand.gram()
    triplets = triplets or _of_basis(operand, by_eigensolver(gram_KK, rank), largest, "eigensolver")
    if not _is_accurate(triplets):
        triplets = _by_svd(operand, short_KL, rank)
    if triplets.residual > RESIDUAL_LIMIT or triplets.orthogonality > RESIDUAL_LIMIT:
        raise SpectrumError(f"{name}: singular triplets miss the weight by {triplets.residual:.1e} of its norm")
    return triplets


def _by_lanczos(operand: Operand, gram_KK: torch.Tensor, rank: int, largest: float) -> Triplets | None:
    """None where it does not converge or is not proved complete; overwrites the Gram matrix."""
    basis_KR = by_lanczos(gram_KK, rank)
    if basis_KR is None:
        return None
    triplets = _of_basis(operand, basis_KR, largest, "lanczos")
    if not is_complete(gram_KK, triplets.left_OR, triplets.singular_values_R.square()):
        return None
    return triplets


def _of_basis(operand: Operand, basis_KR: torch.Tensor, largest: float, method: str) -> Triplets:
    """The triplets inside an orthonormal basis of the bottom subspace."""
    # The projected R x L matrix gives the singular values to full precision; the eigenvalues are their squares.
    inner_RR, values_R, rows_RL = torch.linalg.svd(operand.rows(basis_KR), full_matrices=False)
    return _measured(operand, basis_KR @ inner_RR.flip(1), values_R.flip(0), rows_RL.flip(0), largest, method)


def _by_svd(operand: Operand, short_KL: torch.Tensor, rank: int) -> Triplets:
    left_KK, values_K, rows_KL = torch.linalg.svd(short_KL.double(), full_matrices=False)
    bottom = [factor.narrow(dim, -rank, rank).flip(dim) for factor, dim in ((left_KK, 1), (values_K, 0), (rows_KL, 0))]
    return _measured(operand, bottom[0], bottom[1], bottom[2], float(values_K[0]), "svd")


def _measured(
    operand: Operand, short_KR: torch.Tensor, values_R: torch.Tensor, rows_RL: torch.Tensor, largest: float, method: str
) -> Triplets:
    norm = float(values_R.norm())
    errors_R = (operand.columns(rows_RL) - short_KR * values_R).norm(dim=0)
    products_RR = short_KR.T @ short_KR
    return Triplets(
        left_OR=short_KR,
        singular_values_R=values_R,
        right_RI=rows_RL,
        largest=largest,
        residual=float((values_R * errors_R).max()) / (largest * norm) if norm > NOTHING * largest else 0.0,
        orthogonality=float((products_RR - torch.eye(len(values_R)).to(products_RR)).abs().max()),
        method=method,
    )


def _is_accurate(triplets: Triplets) -> bool:
    """Whether the Gram matrix was precise enough: s ||M v - s u|| is the residual of u as its eigenvector."""
    bound = len(triplets.singular_values_R) * triplets.residual * triplets.largest
    return bound <= ENERGY_LIMIT * float(triplets.singular_values_R.norm())


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """As triplets keep it: on the CPU, in fp32."""
    return tensor.to("cpu", torch.float32).contiguous()
