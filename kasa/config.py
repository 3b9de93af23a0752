"""The adapter's hyperparameters, in full words, with the paper's symbols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kasa.truncation import Truncation

Regulariser = Literal["paper", "authors"]
SingularValueStart = Literal["ones", "normal"]


@dataclass(frozen=True)
class KasaConfig:
    """Hyperparameters of one KaSA adapter (arXiv 2412.06071, section 3). Its defaults are those of recipes too.

    Attributes:
        rank: r, the width of the update B diag(d) A.
        alpha: the update is scaled by s = alpha / r.
        dropout: probability of dropping an input of the update.
        truncation: the rule by which a part of each base weight is cut away (`kasa.truncation`). The spectra must have been
            computed for it: `loss` and `activation` need a weighting, the others none.
        dropped_rank: the rank of that part.
        regulariser: which convention `kasa.penalty` follows.
        singular_value_weight: beta, weight of L2 = sum of d squared.
        orthogonality_weight: gamma, weight of L3 = ||B^T B - I||_F + ||A A^T - I||_F.
        singular_values: whether d is learned; otherwise it stays 1, and the update is B A.
        singular_value_start: where a learned d starts: at 1, where the update learns as that of LoRA does, or standard normal,
            as in the paper, where a direction learns in proportion to its |d|.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    truncation: Truncation = "none"
    dropped_rank: int = 8
    regulariser: Regulariser = "authors"
    singular_value_weight: float = 1e-4
    orthogonality_weight: float = 1e-3
    singular_values: bool = True
    singular_value_start: SingularValueStart = "ones"

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.rank
