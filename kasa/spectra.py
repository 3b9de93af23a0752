"""The smallest singular triplets of a weight: what KaSA's truncation drops (arXiv 2412.06071, section 3.1).

Legend: O = out features, I = in features, R = rank, K = min(O, I).

Only a basis of the bottom subspace on the shorter side is needed, and that is an eigenproblem of the K x K Gram matrix,
far cheaper than a full SVD. The Gram matrix squares the condition number, so it is formed in fp64, and every result is
checked against the weight itself; where the check fails, a full fp64 SVD takes over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch

from kasa.errors import SpectrumError

# Of the largest singular value. Rounding in the fp64 Gram route stays two orders below it on real weights.
RESIDUAL_LIMIT = 1e-9

# What is added to a covariance's diagonal, relative to its mean. Fewer tokens than features, or a feature that is always
# zero, leave directions without any energy: anything could be dropped there, though other text may need it.
SHRINKAGE = 0.01


@dataclass(frozen=True)
class BottomTriplets:
    """The R smallest singular triplets of W, or of W L under a covariance C' = L L^T of the layer's input, smallest first,
    so that a prefix serves every smaller rank.

    With M = W or W L, and its triplets (u, s, v), the part of the weight that is dropped is the sum of s u (v^T L^-1). That
    is U U^T W in either case, and of all parts whose removal lowers the rank by R it changes the layer's output least.

    Attributes:
        left_OR: left singular vectors u, columns of unit length.
        singular_values_R: of M, ascending.
        right_RI: v^T, rows of unit length; under a covariance v^T L^-1, rows of any length.
        largest: the largest singular value (spectral norm) of M.
        residual: max over triplets of ||M v - s u|| and ||M^T u - s v||, relative to `largest`.
        method: `gram` or `svd`.
    """

    left_OR: torch.Tensor
    singular_values_R: torch.Tensor
    right_RI: torch.Tensor
    largest: float
    residual: float
    method: str

    def dropped_factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(U_d S_d, V_d^T) of shapes (O, rank) and (rank, I), whose product is the part that is dropped."""
        return self.left_OR[:, :rank] * self.singular_values_R[:rank], self.right_RI[:rank]


# What an adapter and a report need: layer name -> its triplets.
Spectra = Mapping[str, BottomTriplets]


def bottom_triplets(
    weight_OI: torch.Tensor, rank: int, name: str = "weight", covariance_II: torch.Tensor | None = None
) -> BottomTriplets:
    """The `rank` smallest singular triplets of `weight_OI`, computed in fp64 and returned in fp32.

    Args:
        weight_OI: any floating type, square, tall or wide.
        rank: R, between 1 and K.
        name: names the weight in errors.
        covariance_II: C, the mean of x x^T over inputs x of the layer, any floating type. It weights the spectrum: the
            triplets are those of W L with L L^T = C / mean(diag C) + 0.01 I (`SHRINKAGE`). None, or a covariance of
            zeros, weights nothing.

    Raises:
        SpectrumError: the weight is not a floating matrix, has NaN or Inf, or `rank` is out of range; the covariance is
            not a symmetric floating matrix of the weight's width, has NaN or Inf, or has negative eigenvalues.
    """
    smaller_side = _check(weight_OI, rank, name)
    # numpy has no bfloat16; every storage type up to fp32 is exact in fp64.
    matrix = _float64(weight_OI)
    root_II = None if covariance_II is None else _covariance_root(covariance_II, weight_OI.shape[1], name)
    if root_II is not None:
        matrix = matrix @ root_II
    # The iterative solver behind the spectral norm wants a few dimensions and something other than zero.
    triplets = _by_gram(matrix, rank) if smaller_side > 8 and matrix.any() else _by_svd(matrix, rank)
    if triplets.residual > RESIDUAL_LIMIT:
        triplets = _by_svd(matrix, rank)
    if triplets.residual > RESIDUAL_LIMIT:
        raise SpectrumError(f"{name}: singular triplets miss the weight by {triplets.residual:.1e} of its norm")
    if root_II is None:
        return triplets
    right_RI = scipy.linalg.solve_triangular(root_II, _float64(triplets.right_RI).T, trans="T", lower=True).T
    return replace(triplets, right_RI=_float32(right_RI))


def _covariance_root(covariance_II: torch.Tensor, width: int, name: str) -> np.ndarray | None:
    """L of shape (I, I), lower triangular, with L L^T the shrunk covariance; None for a covariance of zeros."""
    if covariance_II.shape != (width, width) or not covariance_II.is_floating_point():
        raise SpectrumError(
            f"{name}: need a floating point covariance of {width} x {width}, the weight's inputs, "
            f"not {covariance_II.dtype} of shape {tuple(covariance_II.shape)}"
        )
    if not torch.isfinite(covariance_II).all():
        raise SpectrumError(f"{name}: the covariance of its inputs holds NaN or Inf")
    covariance = _float64(covariance_II)
    if not covariance.any():
        return None
    mean = float(np.trace(covariance)) / width
    if mean <= 0:
        raise SpectrumError(f"{name}: the covariance of its inputs has negative eigenvalues")
    ridge = SHRINKAGE * np.eye(width)
    try:
        return scipy.linalg.cholesky(covariance / mean + ridge, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        rounding = width * torch.finfo(covariance_II.dtype).eps
        return scipy.linalg.cholesky(_without_negative(covariance / mean, rounding, name) + ridge, lower=True)


def _without_negative(covariance: np.ndarray, rounding: float, name: str) -> np.ndarray:
    """The covariance with eigenvalues that are negative by no more than `rounding`, of the largest, set to zero."""
    values, vectors = scipy.linalg.eigh(covariance, check_finite=False)
    if values[0] < -rounding * values[-1]:
        raise SpectrumError(f"{name}: the covariance of its inputs has negative eigenvalues")
    return (vectors * np.maximum(values, 0.0)) @ vectors.T


def _check(weight_OI: torch.Tensor, rank: int, name: str) -> int:
    if weight_OI.ndim != 2 or not weight_OI.is_floating_point():
        raise SpectrumError(
            f"{name}: need a floating point matrix, not {weight_OI.dtype} of shape {tuple(weight_OI.shape)}"
        )
    smaller_side = min(weight_OI.shape)
    if not 1 <= rank <= smaller_side:
        raise SpectrumError(f"{name}: rank {rank} is not between 1 and {smaller_side}, the smaller side of the weight")
    if not torch.isfinite(weight_OI).all():
        raise SpectrumError(f"{name}: the weight holds NaN or Inf; the checkpoint is damaged")
    return smaller_side


def _by_gram(matrix: np.ndarray, rank: int) -> BottomTriplets:
    tall = matrix.shape[0] > matrix.shape[1]
    short_KL = matrix.T if tall else matrix
    gram_KK = short_KL @ short_KL.T
    basis_KR = scipy.linalg.eigh(gram_KK, subset_by_index=[0, rank - 1], check_finite=False)[1]
    # A start vector of our own keeps the result the same from run to run.
    largest = scipy.sparse.linalg.eigsh(
        gram_KK,
        k=1,
        which="LA",
        v0=np.random.default_rng(0).standard_normal(len(gram_KK)),
        return_eigenvectors=False,
        tol=1e-8,
    )[0]
    # The projected R x L matrix gives the singular values to full precision; the eigenvalues are their squares.
    inner_RR, values_R, long_RL = scipy.linalg.svd(basis_KR.T @ short_KL, full_matrices=False, check_finite=False)
    short_KR = basis_KR @ inner_RR
    left_OR, right_RI = (long_RL.T, short_KR.T) if tall else (short_KR, long_RL)
    return _certified(
        matrix, left_OR[:, ::-1], values_R[::-1], right_RI[::-1], float(np.sqrt(max(largest, 0.0))), "gram"
    )


def _by_svd(matrix: np.ndarray, rank: int) -> BottomTriplets:
    left, values, right = scipy.linalg.svd(matrix, full_matrices=False, check_finite=False, lapack_driver="gesvd")
    bottom = slice(None, -rank - 1, -1)
    return _certified(matrix, left[:, bottom], values[bottom], right[bottom], float(values[0]), "svd")


def _certified(
    matrix: np.ndarray, left_OR: np.ndarray, values_R: np.ndarray, right_RI: np.ndarray, largest: float, method: str
) -> BottomTriplets:
    forward = np.linalg.norm(matrix @ right_RI.T - left_OR * values_R, axis=0).max()
    backward = np.linalg.norm(left_OR.T @ matrix - values_R[:, None] * right_RI, axis=1).max()
    return BottomTriplets(
        left_OR=_float32(left_OR),
        singular_values_R=_float32(values_R),
        right_RI=_float32(right_RI),
        largest=largest,
        residual=float(max(forward, backward) / largest) if largest else 0.0,
        method=method,
    )


def _float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().to(torch.float64).numpy()


def _float32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
