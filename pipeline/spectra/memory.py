"""What the decomposition of one weight needs at once, from its shape: what its task reserves on a node.

Legend: O = out features, I = in features, K = min(O, I).
"""

from __future__ import annotations

from kasa.targets import Target
from pipeline.config.recipe import Weighted

# A worker with torch and this package loaded.
_PROCESS_BYTES = 2**29
# A covariance is kept in fp32, and its root in fp64; while the root is made there are more of it.
_KEPT_BYTES, _ROOTED_BYTES = 4 + 8, 30
# The Gram matrix in fp64, its factor, and the Krylov space, which may span a third of it.
_GRAM_BYTES = 8 + 8 + 4


def decomposition_bytes(target: Target, element_bytes: int, weighted: Weighted) -> int:
    """Peak memory of the task in bytes, its process included; `element_bytes` is that of the stored weight.

    `weighted` says which covariances come in: none, that of the inputs, or that of the output's gradients as well (which
    layers with O > I do without, see `kasa.calibration`). A full SVD, which is the rare last resort, needs more.
    """
    size = target.out_features * target.in_features
    smaller = min(target.out_features, target.in_features) ** 2
    inputs = 0 if weighted == "no" else target.in_features**2
    gradients = target.out_features**2 if weighted == "both" and target.out_features <= target.in_features else 0
    # The weight in fp64; a weighted one is a product, made of another in fp64.
    copies = 8 if weighted == "no" else 16
    stages = (
        _ROOTED_BYTES * inputs,
        _KEPT_BYTES * inputs + _ROOTED_BYTES * gradients,
        _KEPT_BYTES * (inputs + gradients) + copies * size + _GRAM_BYTES * smaller,
    )
    return _PROCESS_BYTES + element_bytes * size + max(stages)
