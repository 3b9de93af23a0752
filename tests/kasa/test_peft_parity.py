"""One layer of each shape against PEFT's KaSA with the same A, d and B, and against the formula written out in fp64."""

import pytest
import torch

from tests.support.interchange import difference, layer_differences


@pytest.mark.parametrize("shape", [(40, 40), (64, 40), (40, 64)])
def test_parity_of_one_layer(shape: tuple[int, int]) -> None:
    layer = layer_differences(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert layer["peft"] <= 1e-4
    assert layer["fp32"] <= 1e-5
    assert layer["fp64"] <= 1e-12
    assert 0 < layer["fp64"] < layer["fp64_with_another_svd"] < layer["fp32"] < layer["peft_to_reference"]


def test_a_difference_is_relative_to_the_largest_value() -> None:
    theirs = [torch.tensor([1.0, -8.0]), torch.tensor([2.0])]
    assert difference([torch.tensor([1.0, -7.0]), torch.tensor([4.0])], theirs) == 0.25
