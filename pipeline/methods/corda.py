"""CorDA (arXiv 2406.05223): a LoRA that starts from the part of each weight that counts most for some text.

With C the second moment of a layer's inputs, W C = U S V^T; the start is the r largest triplets' U S V^T C^-1, the form that
the paper calls instruction-previewed and PEFT offers as `ipm`. As U^T W C = S V^T, that is U U^T W: no inverse is needed.

C is that of `kasa.calibration`, in which every token counts alike whatever its norm, scaled to a mean diagonal of 1 and shrunk as
PEFT does it. PEFT scales the inputs by the largest of each sample instead. With white inputs this is PiSSA.

Legend: O = out features, I = in features, R = rank, K = min(O, I).
"""

from __future__ import annotations

import torch

from kasa.bottom import Operand, spectral_norm
from kasa.errors import SpectrumError
from kasa.spectra import Triplets, stored
from kasa.weighting import Weighting


def leading_triplets(weight_OI: torch.Tensor, rank: int, name: str, weighting: Weighting) -> Triplets:
    """The `rank` largest triplets (u, s, v) of W C, largest first, as (u, s, v^T C^-1); computed in fp64, returned in fp32 on
    the CPU.

    Raises:
        SpectrumError: the weight or C holds NaN or Inf, or C is not of the weight's width or has negative eigenvalues.
    """
    if not torch.isfinite(weight_OI).all():
        raise SpectrumError(f"{name}: the weight holds NaN or Inf; the checkpoint is damaged")
    weight_OI = weight_OI.detach().double()
    root_II = weighting.roots(weight_OI, name)[1]
    product_OI = weight_OI if root_II is None else weight_OI @ root_II @ root_II.T
    tall = product_OI.shape[0] > product_OI.shape[1]
    short_KL = product_OI.T if tall else product_OI
    energies_K, vectors_KK = torch.linalg.eigh(short_KL @ short_KL.T)
    short_KR = vectors_KK[:, -rank:].flip(1)
    values_R = energies_K[-rank:].flip(0).clamp(min=0).sqrt()
    # Where the weight has not so many, what would be divided by nothing is nothing.
    divisors_R = values_R.clamp(min=torch.finfo(values_R.dtype).eps * float(values_R[0]) or 1.0)
    long_RL = (short_KR.T @ short_KL) / divisors_R[:, None]
    left_OR = long_RL.T if tall else short_KR
    errors_R = (short_KL @ long_RL.T - short_KR * values_R).norm(dim=0)
    scale = float(values_R[0] * values_R.norm()) or 1.0
    return Triplets(
        left_OR=stored(left_OR),
        singular_values_R=stored(values_R),
        right_RI=stored((left_OR.T @ weight_OI) / divisors_R[:, None]),
        largest=spectral_norm(Operand(weight_OI)),
        residual=float((values_R * errors_R).max()) / scale,
        orthogonality=float((short_KR.T @ short_KR - torch.eye(rank).to(short_KR)).abs().max()),
        method="eigensolver",
    )
