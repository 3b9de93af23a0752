"""Small models with one layer of each shape: square, tall, wide, and GPT-2's transposed Conv1D."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kasa import KasaConfig, bottom_triplets, find_targets

WIDTHS = {"square": (24, 24), "tall": (24, 40), "wide": (40, 24), "conv": (24, 36)}


class Shapes(nn.Module):
    """Layers by shape; named (in, out) as in `WIDTHS`."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("square", "tall", "wide"):
            setattr(self, name, nn.Linear(*WIDTHS[name]))
        self.conv = Conv1D(WIDTHS["conv"][1], WIDTHS["conv"][0])
        self.norm = nn.LayerNorm(24)


@pytest.fixture
def model() -> Shapes:
    torch.manual_seed(0)
    shapes = Shapes()
    with torch.no_grad():
        for parameter in shapes.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return shapes


def weight_of(module: nn.Module) -> torch.Tensor:
    """W as out x in."""
    return module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()


@pytest.fixture
def spectra(model: Shapes) -> dict:
    return {
        t.name: bottom_triplets(weight_of(model.get_submodule(t.name)), 6) for t in find_targets(model, "all-linear")
    }


@pytest.fixture
def config() -> KasaConfig:
    return KasaConfig(rank=6, alpha=9.0, dropped_rank=4)
