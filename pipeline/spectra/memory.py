"""The peak memory of a decomposition, from the shape of its weight: what its task reserves on a node.

The driver imports this module, so it must not import torch.

Legend: O = out features, I = in features, K = min(O, I).
"""

from __future__ import annotations

from kasa.targets import Target
from pipeline.config.recipe import Weighted

# A worker process with torch and this package loaded.
_PROCESS_BYTES = 2**29
# Bytes per element of a covariance: kept in fp32 and its root in fp64; several fp64 copies exist while the root is computed.
_KEPT_BYTES, _ROOTED_BYTES = 4 + 8, 30
# Bytes per element of K x K: the Gram matrix in fp64, its factor, and the Krylov space, which may span a third of it.
_GRAM_BYTES = 8 + 8 + 4


def decomposition_bytes(target: Target, element_bytes: int, weighted: Weighted) -> int:
    """Peak memory of a decomposition in bytes, its process included.

    A full SVD, the rare last resort, needs more.

    Args:
        target: the weight.
        element_bytes: of the stored weight.
        weighted: which covariances take part: none, that of the inputs, or that of the output gradients as well. Layers
            with O > I do without the latter (see `kasa.calibration`).
    """
    size = target.out_features * target.in_features
    smaller = min(target.out_features, target.in_features) ** 2
    inputs = 0 if weighted == "no" else target.in_features**2
    gradients = target.out_features**2 if weighted == "both" and target.out_features <= target.in_features else 0
    # Bytes per element of O x I: the weight in fp64, and the product with the covariances' roots.
    copies = 8 if weighted == "no" else 16
    stages = (
        _ROOTED_BYTES * inputs,
        _KEPT_BYTES * inputs + _ROOTED_BYTES * gradients,
        _KEPT_BYTES * (inputs + gradients) + copies * size + _GRAM_BYTES * smaller,
    )
    return _PROCESS_BYTES + element_bytes * size + max(stages)
