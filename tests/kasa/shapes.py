"""A model with one layer of each shape: square, tall, wide, and GPT-2's transposed Conv1D."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kasa.adapter import trainable_parameters

WIDTHS = {"square": (24, 24), "tall": (24, 40), "wide": (40, 24), "conv": (24, 36)}


class Shapes(nn.Module):
    """Layers by shape; named (in, out) as in `WIDTHS`."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("square", "tall", "wide"):
            setattr(self, name, nn.Linear(*WIDTHS[name]))
        self.conv = Conv1D(WIDTHS["conv"][1], WIDTHS["conv"][0])
        self.norm = nn.LayerNorm(24)


def weight_of(module: nn.Module) -> torch.Tensor:
    """W as out x in."""
    return module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()


def randomise(model: nn.Module, name: str | None = None, scale: float = 1.0) -> None:
    """Give B (and all else that trains) values as after training: with B = 0 most mistakes do not show."""
    generator = torch.Generator().manual_seed(7)
    for parameter in trainable_parameters(model, name).values():
        values = scale * torch.randn(parameter.shape, generator=generator)
        parameter.data = values.to(parameter)
