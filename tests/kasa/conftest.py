"""A small model, its spectra and an adapter's settings."""

import pytest
import torch

from kasa import KasaConfig, find_targets
from kasa.spectra import bottom_triplets
from tests.kasa.shapes import Shapes, weight_of


@pytest.fixture
def model() -> Shapes:
    torch.manual_seed(0)
    shapes = Shapes()
    with torch.no_grad():
        for parameter in shapes.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return shapes


@pytest.fixture
def spectra(model: Shapes) -> dict:
    return {
        t.name: bottom_triplets(weight_of(model.get_submodule(t.name)), 6) for t in find_targets(model, "all-linear")
    }


@pytest.fixture
def config() -> KasaConfig:
    return KasaConfig(rank=6, alpha=9.0, truncation="loss", dropped_rank=4, singular_value_start="normal")
