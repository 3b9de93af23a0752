"""The adapted layer: W x + s B (d * (A x)) - U_d S_d (V_d^T x). The base module and its weight are never touched.

Legend: O = out features, I = in features, R = adapter rank, D = dropped rank.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from kasa.config import KasaConfig
from kasa.targets import Target

# The trainable tensors of a layer and the frozen ones, by attribute name.
TRAINABLE = ("a", "d", "b")
FROZEN = ("dropped_left", "dropped_right")


class KasaLayer(nn.Module):
    """A frozen base module with a KaSA update beside it.

    Args:
        base: the module that is adapted; anything with a forward from (..., I) to (..., O).
        target: its name and shape.
        config: rank, scale, dropout.
        dropped: (U_d S_d of shape (O, D), V_d^T of shape (D, I)), or None to drop nothing.

    The trainable tensors start as the paper has them (A kaiming uniform, d standard normal, B zero), so that the layer
    starts as the truncated base exactly.
    """

    def __init__(
        self, base: nn.Module, target: Target, config: KasaConfig, dropped: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        super().__init__()
        self.base = base
        self.target = target
        self.scale = config.scale
        self.enabled = True
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.a = nn.Parameter(torch.empty(config.rank, target.in_features))
        self.d = nn.Parameter(torch.empty(config.rank))
        self.b = nn.Parameter(torch.zeros(target.out_features, config.rank))
        left, right = dropped if dropped is not None else (None, None)
        # Parameters, not buffers: ZeRO-3 partitions parameters only.
        self.dropped_left = _frozen(left)
        self.dropped_right = _frozen(right)

    def reset(self, generator: torch.Generator) -> None:
        """Draw A and d anew from `generator` and set B to zero."""
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5), generator=generator)
        nn.init.normal_(self.d, generator=generator)
        nn.init.zeros_(self.b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        y = self.base(x)
        if not self.enabled:
            return y
        # Without autocast the adapter may be kept in another type than the activations.
        z = x if torch.is_autocast_enabled(x.device.type) else x.to(self.a.dtype)
        update = functional.linear(functional.linear(self.dropout(z), self.a) * (self.scale * self.d), self.b)
        if self.dropped_left is not None and self.dropped_right is not None:
            update = update - functional.linear(functional.linear(z, self.dropped_right), self.dropped_left)
        return y + update.to(y.dtype)

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        dropped = 0 if self.dropped_left is None else self.dropped_left.shape[-1]
        return f"rank={self.d.shape[0]}, scale={self.scale:g}, dropped_rank={dropped}"


def _frozen(tensor: torch.Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.clone(), requires_grad=False)
