"""Methods that start from a part of each base weight: PiSSA, OLoRA, MiLoRA and CorDA.

W = (W0 - s B0 A0) + s B A: the part s B0 A0 is taken out of the base while the model trains, and B A begins as that part. So
a trained adapter is, on the untouched base, an ordinary LoRA of twice the rank: W = W0 + [s B | -s B0] [A ; A0].

- PiSSA (arXiv 2404.02948): the r largest singular triplets; B0 = U sqrt(S / s), A0 = sqrt(S / s) V^T.
- MiLoRA (arXiv 2406.09044): the r smallest, likewise.
- OLoRA (arXiv 2406.01775): the first r columns and rows of W0 = Q R; B0 = Q, A0 = R.
- CorDA (arXiv 2406.05223): the r triplets that count most for some text (`pipeline.methods.corda`), shared out as in PiSSA.

PEFT has all but MiLoRA. Its own start leaves B0 and A0 in the base's type, in which bf16 would round them after they
are taken out; here they are kept in fp32.

Legend: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kasa.spectra import Triplets, bottom_triplets

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
