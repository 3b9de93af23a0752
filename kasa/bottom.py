"""Bottom eigenvectors of a matrix times its transpose, in fp64, on the CPU or on a CUDA device.

Legend: K = shorter side, L = longer side, R = rank, B = block, N = size of the Krylov space.

Two routes, by size. LAPACK's subset eigensolver, which reduces all of the Gram matrix to tridiagonal form; and, for
large K, block Lanczos on the inverse through one Cholesky factorisation, whose result a second one proves complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from kasa import lapack

# A wider block takes fewer steps, a narrower one a smaller space; 8 columns cost a triangular solve little more than one.
BLOCK = 8
# Of an eigenvalue: far below what neighbouring singular values differ by, so that they do not mix.
RITZ_TOLERANCE = 1e-9
# Of the mean dropped energy: what the proof of completeness leaves open, 1e-6 of the dropped norm with the residual's share.
PROOF_SLACK = 1e-6
# Added to the diagonal before the factorisation, relative to the trace, which bounds the rounding of the Gram matrix.
RIDGE = 1e-14
# Columns converted to fp64 at a time on a device, so that it holds little more than the weight itself.
CHUNK = 2048


class Operand:
    """A matrix of shape (K, L), K <= L, whose products are computed in fp64 whatever it is stored in."""

    def __init__(self, short_KL: torch.Tensor) -> None:
        on_cpu = _on_cpu(short_KL)
        self._stored_KL = short_KL.double() if on_cpu else short_KL
        self._width = short_KL.shape[1] if on_cpu else CHUNK

    def gram(self) -> torch.Tensor:
        """(K, K), the matrix times its transpose."""
        return _sum(_product(part, part.T) for part in self.parts())

    def rows(self, basis_KR: torch.Tensor) -> torch.Tensor:
        """(R, L): basis^T times the matrix."""
        return torch.cat([_product(basis_KR.T, part) for part in self.parts()], dim=1)

    def columns(self, rows_RL: torch.Tensor) -> torch.Tensor:
        """(K, R): the matrix times rows^T."""
        pairs = zip(self.parts(), rows_RL.split(self._width, dim=1), strict=True)
        return _sum(_product(part, rows.T) for part, rows in pairs)

    def parts(self) -> Iterator[torch.Tensor]:
        """Pieces of columns in fp64, in order."""
        return (part.double() for part in self._stored_KL.split(self._width, dim=1))


def _sum(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    """The sum of at least one matrix, in the storage of the first."""
    total = next(parts)
    for part in parts:
        total += part
    return total


def gram_norm(gram_KK: torch.Tensor) -> float:
    """The largest eigenvalue of a Gram matrix, within a few percent from below."""
    return _spectral_radius(lambda vector_K1: _product(gram_KK, vector_K1), _random(gram_KK, 1))


def spectral_norm(operand: Operand) -> float:
    """The largest singular value of a matrix whose Gram matrix is not at hand, within a few percent from below."""
    start_K1 = _random(next(operand.parts()), 1)
    return _spectral_radius(lambda vector_K1: operand.columns(operand.rows(vector_K1)), start_K1) ** 0.5


def _spectral_radius(apply: Callable[[torch.Tensor], torch.Tensor], start_K1: torch.Tensor, steps: int = 12) -> float:
    """The largest eigenvalue of a positive semidefinite matrix, given by its product with a vector, by Lanczos.

    Without orthogonalisation against older vectors: its loss repeats eigenvalues that are found, and invents none.
    """
    vector_K1 = start_K1 / start_K1.norm()
    older_K1, beta = torch.zeros_like(vector_K1), 0.0
    alphas, betas = [], []
    for _ in range(min(steps, len(start_K1))):
        next_K1 = apply(vector_K1)
        alphas.append(float(_product(vector_K1.T, next_K1)))
        next_K1 -= alphas[-1] * vector_K1 + beta * older_K1
        beta = float(next_K1.norm())
        if beta <= 1e-10 * abs(alphas[0]):
            break
        betas.append(beta)
        older_K1, vector_K1 = vector_K1, next_K1 / beta
    tridiagonal = np.diag(alphas) + np.diag(betas[: len(alphas) - 1], 1)
    return max(0.0, float(np.linalg.eigvalsh(tridiagonal, UPLO="U")[-1]))


def by_eigensolver(gram_KK: torch.Tensor, rank: int) -> torch.Tensor:
    """The bottom `rank` eigenvectors as (K, R), by LAPACK; none can be missed."""
    if _on_cpu(gram_KK):
        return lapack.bottom_eigenvectors(gram_KK, rank)
    return torch.linalg.eigh(gram_KK).eigenvectors[:, :rank]


def by_lanczos(gram_KK: torch.Tensor, rank: int) -> torch.Tensor | None:
    """The bottom `rank` eigenvectors as (K, R), by block Lanczos on the inverse; None where it does not converge.

    Started from random vectors, it misses an eigenvector with probability next to nothing, except one of an eigenvalue
    that has more of them than a block has columns: `is_complete` tells.
    """
    ridge = RIDGE * float(gram_KK.trace())
    lower_KK = _shifted_factor(gram_KK, -ridge)
    if lower_KK is None:
        return None
    found = _lanczos(lower_KK, _random(gram_KK, max(BLOCK, rank // 4)), rank, may_stop=True)
    if not found.converged and found.is_crowded:
        # The distance of the smallest eigenvalues from zero slows the iterations down, not that from each other.
        low, high = 1 / float(found.values_R[-1]) - ridge, 1 / float(found.values_R[0]) - ridge
        shifted_KK = _shifted_factor(gram_KK, low - (high - low) / 2)
        lower_KK = lower_KK if shifted_KK is None else shifted_KK
        found = _lanczos(lower_KK, found.basis_KR, rank, may_stop=False)
    if not found.converged:
        return None
    # What is left of the top of the spectrum in the basis weighs most in the dropped part; this takes it out.
    return torch.linalg.qr(_solve(lower_KK, found.basis_KR)).Q


@dataclass(frozen=True)
class _Ritz:
    """The top eigenpairs of an inverse as far as they are found; ascending values."""

    values_R: torch.Tensor
    basis_KR: torch.Tensor
    converged: bool

    @property
    def is_crowded(self) -> bool:
        """Whether the R eigenvalues are nearer to each other than to zero."""
        return bool(self.values_R[-1] < 2 * self.values_R[0])


def _lanczos(lower_KK: torch.Tensor, start_KB: torch.Tensor, rank: int, may_stop: bool) -> _Ritz:
    """Block Lanczos with full orthogonalisation on the inverse of L L^T, until it converges or has spanned a third of K.

    With `may_stop`, not further than to the first look at the Ritz values where these are crowded.
    """
    block = start_KB.shape[1]
    limit = len(lower_KK) // 3 // block * block
    # Vectors are rows, so that a part of them is one piece of memory.
    space_NK = lower_KK.new_empty(limit + block, len(lower_KK))
    space_NK[:block] = torch.linalg.qr(start_KB).Q.T
    projected_NN = lower_KK.new_zeros(limit, limit)
    look_at = 4 * rank
    for size in range(block, limit + 1, block):
        last = slice(size - block, size)
        basis_NK = space_NK[:size]
        image_KB = _solve(lower_KK, basis_NK[last].T)
        projected_NN[:size, last] = _product(basis_NK, image_KB)
        next_KB, growth_BB = _orthonormal_rest(image_KB, basis_NK)
        space_NK[size : size + block] = next_KB.T
        if size < look_at and size + block <= limit:
            continue
        look_at = size + size // 8
        values_N, vectors_NN = torch.linalg.eigh(projected_NN[:size, :size], UPLO="U")
        values_R, vectors_NR = values_N[-rank:], vectors_NN[:, -rank:]
        residuals_R = (growth_BB @ vectors_NR[last]).norm(dim=0)
        converged = bool((residuals_R <= RITZ_TOLERANCE * values_R).all())
        found = _Ritz(values_R, _product(basis_NK.T, vectors_NR), converged)
        if converged or (may_stop and found.is_crowded):
            break
    return found


def is_complete(gram_KK: torch.Tensor, basis_KR: torch.Tensor, values_R: torch.Tensor) -> bool:
    """Whether no eigenvector outside the basis has an eigenvalue below the largest of `values_R`; overwrites the Gram matrix.

    Moving the basis to the top of the spectrum and taking t off all eigenvalues leaves a positive definite matrix exactly
    if the Gram matrix is above t outside the basis; then at most R of its eigenvalues are below t (Courant-Fischer). A
    Cholesky factorisation decides that, up to the rounding of the Gram matrix. t is `PROOF_SLACK` of the mean value below
    the largest one.
    """
    threshold = float(values_R.max() - PROOF_SLACK * values_R.mean())
    gram_KK.addmm_(basis_KR * max(float(gram_KK.diagonal().max()), 2 * threshold), basis_KR.T)
    return _shifted_factor(gram_KK, threshold) is not None


def cholesky(matrix_KK: torch.Tensor) -> torch.Tensor | None:
    """The lower factor, or None for a matrix that is not positive definite."""
    if _on_cpu(matrix_KK):
        return lapack.cholesky(matrix_KK)
    lower_KK, info = torch.linalg.cholesky_ex(matrix_KK)
    return None if int(info) else lower_KK


def _shifted_factor(gram_KK: torch.Tensor, shift: float) -> torch.Tensor | None:
    """The Cholesky factor with `shift` taken off all eigenvalues."""
    diagonal_K = gram_KK.diagonal()
    kept_K = diagonal_K.clone()
    diagonal_K -= shift
    lower_KK = cholesky(gram_KK)
    diagonal_K.copy_(kept_K)
    return lower_KK


def _solve(lower_KK: torch.Tensor, right_KB: torch.Tensor) -> torch.Tensor:
    half_KB = torch.linalg.solve_triangular(lower_KK, right_KB, upper=False)
    return torch.linalg.solve_triangular(lower_KK.T, half_KB, upper=True)


def _orthonormal_rest(image_KB: torch.Tensor, basis_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the basis lacks of the image: Q of shape (K, B) orthogonal to the basis, and F (B, B) with Q F the part lacking."""
    first_KB, first_BB = torch.linalg.qr(image_KB - _product(basis_NK.T, _product(basis_NK, image_KB)))
    # Twice: what little is left of an image inside the basis is rounding, and not orthogonal to it.
    second_KB, second_BB = torch.linalg.qr(first_KB - _product(basis_NK.T, _product(basis_NK, first_KB)))
    return second_KB, second_BB @ first_BB


def _on_cpu(tensor: torch.Tensor) -> bool:
    """Whether numpy and scipy compute, which need half the time of torch for what is symmetric."""
    return tensor.device.type == "cpu"


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right. On the CPU by numpy, which also computes half of a matrix times its transpose only (dsyrk)."""
    if _on_cpu(left):
        return torch.from_numpy(left.numpy() @ right.numpy())
    return left @ right


def _random(like_KK: torch.Tensor, columns: int) -> torch.Tensor:
    """Normal draws of a fixed seed, so that results repeat."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(like_KK), columns, generator=generator, dtype=torch.float64).to(like_KK.device)
