"""A product of two skinny factors, such as a trained update, seen as a matrix of its own.

Legend: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import torch


def product_singular_values(left_OR: torch.Tensor, right_RI: torch.Tensor) -> list[float]:
    """Singular values of `left_OR @ right_RI`, descending; no O x I matrix is formed.

    With left = Q_l R_l and right^T = Q_r R_r they are those of R_l R_r^T, an R x R matrix.
    """
    left_RR = torch.linalg.qr(left_OR.double(), mode="r").R
    right_RR = torch.linalg.qr(right_RI.double().T, mode="r").R
    return torch.linalg.svdvals(left_RR @ right_RR.T).tolist()
