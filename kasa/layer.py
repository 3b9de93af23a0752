"""The adapted layer: W x + s B (d * (A x)) - U_d S_d (V_d^T x). One base module carries any number of updates.

Beside any base module the update is added to its output. A plain linear base and its update are computed as one
(`_AdaptedLinear`), which makes the dropped part nearly free.

Legend: O = out features, I = in features, R = adapter rank, D = dropped rank, N = positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional

from kasa.config import KasaConfig
from kasa.errors import KasaError
from kasa.targets import Target

# The trainable tensors of an update and the frozen ones, by attribute name.
TRAINABLE = ("a", "d", "b")
FROZEN = ("dropped_left", "dropped_right")


class KasaUpdate(nn.Module):
    """What one adapter adds to one layer's output: s B (d * (A x)) - U_d S_d (V_d^T x).

    Args:
        a_RI, d_R, b_OR: the trainable tensors; they are taken over, not copied.
        dropped: (U_d S_d of shape (O, D), V_d^T of shape (D, I)), or None to drop nothing; taken over likewise.
        config: scale, dropout, and whether d is learned.
    """

    def __init__(
        self,
        a_RI: torch.Tensor,
        d_R: torch.Tensor,
        b_OR: torch.Tensor,
        dropped: tuple[torch.Tensor, torch.Tensor] | None,
        config: KasaConfig,
    ) -> None:
        super().__init__()
        self.scale = config.scale
        self.dropout = config.dropout
        # What is held fixed beside the dropped part.
        self.fixed = () if config.singular_values else ("d",)
        self.a = nn.Parameter(a_RI)
        self.d = nn.Parameter(d_R)
        self.b = nn.Parameter(b_OR)
        left, right = dropped if dropped is not None else (None, None)
        # Parameters, not buffers: ZeRO-3 partitions parameters only.
        self.dropped_left = _frozen(left)
        self.dropped_right = _frozen(right)

    @classmethod
    def fresh(
        cls,
        target: Target,
        config: KasaConfig,
        dropped: tuple[torch.Tensor, torch.Tensor] | None,
        generator: torch.Generator,
    ) -> KasaUpdate:
        """A kaiming uniform, d as `config` says, B zero: the layer is the truncated base."""
        a_RI = torch.empty(config.rank, target.in_features)
        nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
        d_R = torch.ones(config.rank)
        if config.singular_values and config.singular_value_start == "normal":
            d_R.normal_(generator=generator)
        return cls(a_RI, d_R, torch.zeros(target.out_features, config.rank), dropped, config)

    def forward(self, x: torch.Tensor, y: torch.Tensor, base_is_truncated: bool = False) -> torch.Tensor:
        """y plus the update of x: (..., I), (..., O) -> (..., O), in y's type.

        Both products run through one pair of skinny matrices, [A; V_d^T] and [s B diag(d) | -U_d S_d].
        """
        # Without autocast the adapter may be kept in another type than the activations.
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.a.dtype)
        up = self._scaled_b()
        if self.dropped_left is None or self.dropped_right is None or base_is_truncated:
            down = functional.linear(self._drop_inputs(x), self.a)
        else:
            up = torch.cat([up, -self.dropped_left], dim=1)
            if self.training and self.dropout:
                learned = functional.linear(self._drop_inputs(x), self.a)
                down = torch.cat([learned, functional.linear(x, self.dropped_right)], dim=-1)
            else:
                down = functional.linear(x, torch.cat([self.a, self.dropped_right]))
        if y.dtype != down.dtype:
            return y + functional.linear(down, up).to(y.dtype)
        sum_NO = torch.addmm(y.reshape(-1, y.shape[-1]), down.reshape(-1, down.shape[-1]), up.t())
        return sum_NO.view(y.shape)

    def with_base(self, x: torch.Tensor, base: nn.Linear, base_is_truncated: bool = False) -> torch.Tensor:
        """What `forward` makes of x and base(x), where `fits` allows: (..., I) -> (..., O)."""
        left, right = (None, None) if base_is_truncated else (self.dropped_left, self.dropped_right)
        y_NO = _AdaptedLinear.apply(x.flatten(0, -2), base.weight, base.bias, self.a, self._scaled_b(), left, right)
        return y_NO.view(*x.shape[:-1], -1)

    def fits(self, base: nn.Module, x: torch.Tensor) -> TypeGuard[nn.Linear]:
        """Whether base and update can be computed as one: all in one type, and a call of either does nothing else."""
        return (
            type(base) is nn.Linear
            and type(base.weight) is nn.Parameter
            and not any(parameter.requires_grad for parameter in base.parameters(recurse=False))
            and x.dtype == base.weight.dtype == self.a.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and not (self.training and self.dropout)
            and _is_bare(base)
            and _is_bare(self)
        )

    def _scaled_b(self) -> torch.Tensor:
        return self.b * (self.scale * self.d)

    def _drop_inputs(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, self.dropout, self.training)

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        dropped = 0 if self.dropped_left is None else self.dropped_left.shape[-1]
        return f"rank={self.d.shape[0]}, scale={self.scale:g}, dropped_rank={dropped}"


class KasaLayer(nn.Module):
    """A frozen base module with KaSA updates beside it, of which at most one is active.

    Args:
        base: the module that is adapted; anything with a forward from (..., I) to (..., O).
        target: its name and shape.

    Attributes:
        updates: adapter name -> its update of this layer.
        active: the name of the adapter in force, or None: the base alone.
        folded: whether the dropped part is to be taken out of the base weight itself, see `fold`.
    """

    def __init__(self, base: nn.Module, target: Target) -> None:
        super().__init__()
        self.base = base
        self.target = target
        self.updates = nn.ModuleDict()
        self.active: str | None = None
        self.folded = False
        self._whole_weight: torch.Tensor | None = None
        self.training = base.training

    @property
    def update(self) -> KasaUpdate | None:
        """The active update."""
        return None if self.active is None else self.updates[self.active]  # type: ignore[return-value]

    # Some transformers models (T5, for one) look at the weight of a linear module.
    @property
    def weight(self) -> Any:
        """The base's weight."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base's bias."""
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        update, is_truncated = self.update, self._whole_weight is not None
        if update is None:
            return self.base(x)
        if update.fits(self.base, x):
            return update.with_base(x, self.base, is_truncated)
        return update(x, self.base(x), is_truncated)

    def switch(self, name: str | None) -> None:
        """Make adapter `name` the active one; where it has no update of this layer, or for None, the base alone."""
        folded = self.folded
        self.unfold()
        self.active = name if name is not None and name in self.updates else None
        if folded:
            self.fold()

    @torch.no_grad()
    def fold(self) -> None:
        """Put a truncated copy in the base weight's place, until `unfold`; the whole weight is kept beside it.

        Raises:
            KasaError: the weight is quantised or partitioned.
        """
        self.folded = True
        update = self.update
        if self._whole_weight is not None or update is None or update.dropped_left is None:
            return
        assert update.dropped_right is not None
        weight = self.base.weight
        dropped_OI = update.dropped_left @ update.dropped_right
        dropped = dropped_OI.t() if self.target.transposed else dropped_OI
        if not torch.is_tensor(weight) or weight.shape != dropped.shape or not weight.is_floating_point():
            self.folded = False
            raise KasaError(
                f"{self.target.name} is a {type(self.base).__name__} without a plain weight, so nothing can be folded "
                "into it; leave the adapter as it is: the residual form works on any base"
            )
        self._whole_weight = weight.data
        weight.data = (weight - dropped).to(weight.dtype)

    def unfold(self) -> None:
        """Put the whole base weight back, the very tensor that `fold` took away."""
        self.folded = False
        if self._whole_weight is not None:
            self.base.weight.data = self._whole_weight
            self._whole_weight = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> KasaLayer:
        # A change of device or type has to reach the whole weight too.
        folded = self.folded
        self.unfold()
        super()._apply(fn, recurse)
        if folded:
            self.fold()
        return self


class _AdaptedLinear(torch.autograd.Function):
    """x W^T + bias + (x [A; V_d^T]^T) [s B diag(d) | -U_d S_d]^T of x (N, I); the last two tensors may be None.

    Against the same written with torch's operations the sums are made in place, in the backward pass too, and the frozen
    halves of both products get no gradient. Gradients go to x, A and s B diag(d).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        up_OR: torch.Tensor,
        left_OD: torch.Tensor | None,
        right_DI: torch.Tensor | None,
    ) -> torch.Tensor:
        y_NO = functional.linear(x_NI, weight_OI, bias_O)
        down_NK = x_NI @ _stacked_down(a_RI, right_DI).t()
        ctx.save_for_backward(x_NI, weight_OI, a_RI, up_OR, left_OD, right_DI, down_NK[:, : len(a_RI)])
        return y_NO.addmm_(down_NK, _stacked_up(up_OR, left_OD).t())

    @staticmethod
    def backward(ctx: Any, slope_NO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, weight_OI, a_RI, up_OR, left_OD, right_DI, down_NR = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again, for which the product has to be part of the graph
            down_NR = x_NI @ a_RI.t()
        slope_NK = slope_NO @ _stacked_up(up_OR, left_OD)
        x_slope_NI = a_slope_RI = up_slope_OR = None
        if ctx.needs_input_grad[0]:
            x_slope_NI = (slope_NO @ weight_OI).addmm_(slope_NK, _stacked_down(a_RI, right_DI))
        if ctx.needs_input_grad[3]:
            a_slope_RI = slope_NK[:, : len(a_RI)].t() @ x_NI
        if ctx.needs_input_grad[4]:
            # Not slope^T down: for wide outputs this order takes half the time.
            up_slope_OR = (down_NR.t() @ slope_NO).t()
        return x_slope_NI, None, None, a_slope_RI, up_slope_OR, None, None


def _stacked_down(a_RI: torch.Tensor, right_DI: torch.Tensor | None) -> torch.Tensor:
    return a_RI if right_DI is None else torch.cat([a_RI, right_DI])


def _stacked_up(up_OR: torch.Tensor, left_OD: torch.Tensor | None) -> torch.Tensor:
    return up_OR if left_OD is None else torch.cat([up_OR, -left_OD], dim=1)


def _is_bare(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward: ZeRO-3, offloading and profilers add to the call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in vars(module) and not any(hooks)


def _frozen(tensor: torch.Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
