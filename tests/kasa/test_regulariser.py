"""Both conventions against a plain fp64 reference that really builds the large Gram matrices; and what was learned."""

import pytest
import torch

from kasa import KasaConfig, adapted_layers, attach, find_targets, penalty
from kasa.adapter import trainable_parameters
from kasa.update import product_singular_values
from tests.kasa.shapes import weight_of


def plain_reference(tensors: dict[str, torch.Tensor], names: list[str], convention: str):
    """L2 and L3 as written in the authors' code (in x in and out x out) or in the paper (r x r)."""
    l2 = l3 = torch.zeros((), dtype=torch.float64)
    for name in names:
        a, d, b = (tensors[f"{name}.{part}"] for part in "adb")
        l2 = l2 + (d**2).sum()
        grams = (a.T @ a, b @ b.T) if convention == "authors" else (a @ a.T, b.T @ b)
        for gram in grams:
            l3 = l3 + torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=torch.float64))
    count = len(names) if convention == "authors" else 1
    return l2 / count, l3 / count


@pytest.fixture
def adapted(model, spectra, config):
    attach(model, find_targets(model, "all-linear"), config, spectra)
    generator = torch.Generator().manual_seed(9)
    for parameter in trainable_parameters(model).values():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("convention", ["authors", "paper"])
def test_values_and_gradients(adapted, convention) -> None:
    layers = list(adapted_layers(adapted).values())
    config = KasaConfig(regulariser=convention, singular_value_weight=0.3, orthogonality_weight=0.7)
    ours = penalty(layers, convention)
    ours.weighted(config).backward()

    parameters = trainable_parameters(adapted)
    doubles = {name: parameter.detach().double().requires_grad_() for name, parameter in parameters.items()}
    l2, l3 = plain_reference(doubles, [layer.target.name for layer in layers], convention)
    (0.3 * l2 + 0.7 * l3).backward()

    torch.testing.assert_close(ours.singular_value.double(), l2, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.orthogonality.double(), l3, rtol=1e-6, atol=0)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad.double(), doubles[name].grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("convention", ["authors", "paper"])
def test_the_start_has_finite_gradients(model, spectra, config, convention) -> None:
    layers = attach(model, find_targets(model, "all-linear"), config, spectra).values()
    penalty(layers, convention).weighted(config).backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable_parameters(model).values())


def test_the_conventions_differ_as_documented(adapted) -> None:
    layers = list(adapted_layers(adapted).values())
    paper, authors = penalty(layers, "paper"), penalty(layers, "authors")
    assert paper.singular_value.item() == pytest.approx(len(layers) * authors.singular_value.item(), rel=1e-6)
    assert authors.orthogonality.item() > 1.01 * paper.orthogonality.item() / len(layers)


def test_bf16_tensors_are_penalised_in_fp32(adapted) -> None:
    layers = list(adapted_layers(adapted.bfloat16()).values())
    found = penalty(layers, "authors")
    assert found.singular_value.dtype == found.orthogonality.dtype == torch.float32


@pytest.mark.parametrize("name", ["square", "tall", "wide", "conv"])
def test_product_singular_values_are_those_of_the_dense_update(adapted, name) -> None:
    layer = adapted.get_submodule(name)
    update = layer.update
    a, d, b = update.a.detach(), update.d.detach(), update.b.detach()
    found = product_singular_values(update.scale * b * d, a)
    dense = update.scale * b.double() @ torch.diag(d.double()) @ a.double()
    assert dense.shape == weight_of(layer.base).shape
    torch.testing.assert_close(torch.tensor(found).double(), torch.linalg.svdvals(dense)[:6], rtol=1e-6, atol=1e-9)
