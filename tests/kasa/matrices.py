"""Matrices of known singular values."""

import torch

SHAPES = {"square": (48, 48), "tall": (80, 33), "wide": (33, 80), "tiny": (6, 9)}


def weight_with_values(values: torch.Tensor, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A matrix of the given singular values between random orthonormal bases, fp64."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator, dtype=torch.float64)).Q
    return left * values @ right.T


def spectrum(kind: str, count: int) -> torch.Tensor:
    values = {
        "random": torch.linspace(3.0, 0.2, count, dtype=torch.float64) ** 2,
        "rank deficient": torch.cat([torch.linspace(3, 1, count - count // 2), torch.zeros(count // 2)]),
        "zero": torch.zeros(count),
        "constant": torch.full((count,), 2.0),
        "clustered": 1 + 1e-9 * torch.arange(count, 0, -1, dtype=torch.float64),
        "badly scaled": torch.logspace(0, -8, count, dtype=torch.float64),
    }
    return values[kind].double()
