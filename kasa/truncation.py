"""How much of each base weight is dropped, by rule.

- `loss`: the components with the least effect on the base's loss on real text (`kasa.calibration`, with gradients);
- `activation`: the components with the least effect on what the layer puts out for real text;
- `weight`: the smallest singular triplets of the weight (arXiv 2412.06071, section 3.1);
- `authors`: as `weight`, but keeping `in_features - r` triplets, as github.com/juyongjiang/KaSA @ f85e88c does, so that a
  wide weight (out_features <= in_features - r) stays whole;
- `none`: nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kasa.targets import Target

Truncation = Literal["loss", "activation", "weight", "authors", "none"]


# The rules that look at text.
CALIBRATED: tuple[Truncation, ...] = ("loss", "activation")
# How the bottom of a spectrum is found depends on K, the smaller side of the weight: from this K on, two factorisations and
# the iterations of `kasa.bottom.by_lanczos` take less than the reduction to tridiagonal form. A plan reads it without torch.
LANCZOS_FROM = 1024


def dropped_rank(target: Target, truncation: Truncation, rank: int) -> int:
    """How many components `target` loses under a rule that drops up to `rank`."""
    if truncation == "none":
        return 0
    if truncation == "authors":
        return max(0, min(rank, target.smaller_side - (target.in_features - rank)))
    return rank
