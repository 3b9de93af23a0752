"""Methods that start from a part of each base weight: PiSSA, OLoRA, MiLoRA and CorDA.

W = (W0 - s B0 A0) + s B A: the part s B0 A0 is taken out of the base while the model trains, and B A begins as that part. So
a trained adapter is, on the untouched base, an ordinary LoRA of twice the rank: W = W0 + [s B | -s B0] [A ; A0].

- PiSSA (arXiv 2404.02948): the r largest singular triplets; B0 = U sqrt(S / s), A0 = sqrt(S / s) V^T.
- MiLoRA (arXiv 2406.09044): the r smallest, likewise.
- OLoRA (arXiv 2406.01775): the first r columns and rows of W0 = Q R; B0 = Q, A0 = R.
- CorDA (arXiv 2406.05223): the r triplets that count most for some text (`pipeline.methods.residual`), shared out as in PiSSA.

PEFT has all but MiLoRA. Its own start leaves B0 and A0 in the base's type, in which bf16 would round them after they
are taken out; here they are kept in fp32.

Legend: O = out features, I = in features, R = rank.

CorDA (arXiv 2406.05223): a LoRA that starts from the part of each weight that counts most for some text.

With C the second moment of a layer's inputs, W C = U S V^T; the start is the r largest triplets' U S V^T C^-1, the form that
the paper calls instruction-previewed and PEFT offers as `ipm`. As U^T W C = S V^T, that is U U^T W: no inverse is needed.

C is that of `kasa.calibration`, in which every token counts alike whatever its norm, scaled to a mean diagonal of 1 and shrunk as
PEFT does it. PEFT scales the inputs by the largest of each sample instead. With white inputs this is PiSSA.

Legend: O = out features, I = in features, R = rank, K = min(O, I).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kasa.bottom import Operand, spectral_norm
from kasa.errors import SpectrumError
from kasa.spectra import Triplets, bottom_triplets, stored
from kasa.weighting import Weighting

Factors = tuple[torch.Tensor, torch.Tensor]


def initial_factors(
    method: str, weight_OI: torch.Tensor, rank: int, scale: float, found: Triplets | None = None
) -> Factors:
    """(B0 of shape (O, R), A0 of shape (R, I)) in fp32, on the weight's device; `scale` is s, `found` CorDA's triplets.

    Raises:
        SpectrumError: the weight has NaN or Inf, or `rank` is more than it has singular values.
    """
    if found is not None:
        left_OR, right_RI = found.left_OR.to(weight_OI.device), found.right_RI.to(weight_OI.device)
        return _shared_out(left_OR, found.singular_values_R.to(weight_OI.device), right_RI, scale)
    return _STARTS[method](weight_OI.detach().float(), rank, scale)


def _largest(weight_OI: torch.Tensor, rank: int, scale: float) -> Factors:
    left_OK, values_K, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    return _shared_out(left_OK[:, :rank], values_K[:rank], right_KI[:rank], scale)


def _smallest(weight_OI: torch.Tensor, rank: int, scale: float) -> Factors:
    found = bottom_triplets(weight_OI, rank)
    return _shared_out(found.left_OR, found.singular_values_R, found.right_RI, scale)


def _shared_out(left_OR: torch.Tensor, values_R: torch.Tensor, right_RI: torch.Tensor, scale: float) -> Factors:
    root_R = (values_R / scale).sqrt()
    return left_OR * root_R, root_R[:, None] * right_RI


def _orthonormal(weight_OI: torch.Tensor, rank: int, scale: float) -> Factors:
    q_OK, r_KI = torch.linalg.qr(weight_OI)
    return q_OK[:, :rank].contiguous(), r_KI[:rank].contiguous()


_STARTS: Mapping[str, Callable[[torch.Tensor, int, float], Factors]] = {
    "pissa": _largest,
    "milora": _smallest,
    "olora": _orthonormal,
}
RESIDUAL_METHODS = frozenset(_STARTS) | {"corda"}


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
