"""What a trained layer has learned, seen as a matrix of its own.

Legend: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import torch


def learned_singular_values(a_RI: torch.Tensor, d_R: torch.Tensor, b_OR: torch.Tensor, scale: float) -> list[float]:
    """Singular values of the update s * B diag(d) A, descending; no O x I matrix is formed.

    With B = Q_b R_b and A^T = Q_a R_a they are those of s * R_b diag(d) R_a^T, an R x R matrix.
    """
    factor_b = torch.linalg.qr(b_OR.double(), mode="r").R
    factor_a = torch.linalg.qr(a_RI.double().T, mode="r").R
    return torch.linalg.svdvals(scale * (factor_b * d_R.double()) @ factor_a.T).tolist()
