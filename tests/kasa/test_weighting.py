"""The bottom triplets under a weighting: of the layer's inputs alone, and of the loss's gradients as well."""

import pytest
import torch

from kasa.errors import SpectrumError
from kasa.spectra import bottom_triplets
from kasa.weighting import SHRINKAGE, Weighting
from tests.kasa.matrices import SHAPES, spectrum, weight_with_values


def covariance_of(tokens_TI: torch.Tensor) -> torch.Tensor:
    return tokens_TI.T @ tokens_TI / len(tokens_TI)


def tokens(kind: str, width: int) -> torch.Tensor:
    """Inputs of very different energy by direction."""
    generator = torch.Generator().manual_seed(9)
    count = 7 if kind == "few tokens" else 4 * width
    scales = torch.logspace(0, -2, width, dtype=torch.float64)
    mixed = torch.randn(count, width, generator=generator, dtype=torch.float64) * scales
    mixed = mixed @ torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    if kind == "dead features":
        mixed[:, ::3] = 0
    return mixed


def shrunk(covariance: torch.Tensor) -> torch.Tensor:
    covariance = covariance.double()
    return covariance / covariance.diagonal().mean() + SHRINKAGE * torch.eye(len(covariance))


def root(covariance: torch.Tensor) -> torch.Tensor:
    return torch.linalg.cholesky(shrunk(covariance))


@pytest.mark.parametrize("with_gradients", [False, True], ids=["inputs", "both sides"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("inputs", ["many tokens", "few tokens", "dead features"])
@pytest.mark.parametrize("kind", ["random", "rank deficient", "zero", "constant", "badly scaled"])
def test_the_weighted_cut_is_the_least_of_its_rank(
    kind: str, inputs: str, shape: tuple[int, int], with_gradients: bool
) -> None:
    weight = weight_with_values(spectrum(kind, min(shape)), shape).float()
    covariance = covariance_of(tokens(inputs, shape[1]))
    gradients = covariance_of(tokens("many tokens", shape[0])) if with_gradients else None
    left, right = torch.eye(shape[0]).double() if gradients is None else root(gradients), root(covariance)
    values = torch.linalg.svdvals(left.T @ weight.double() @ right)
    longest = bottom_triplets(weight, 5, weighting=Weighting(covariance, gradients))
    for rank in range(1, 6):
        left_OR, right_RI = (factor.double() for factor in longest.dropped_factors(rank))
        dropped = left_OR @ right_RI
        cost = (left.T @ dropped @ right).square().sum()
        least = values[-rank:].square().sum()
        assert cost <= least * (1 + 1e-5) + (1e-8 * values[0]) ** 2
        # Removing it takes the rank down: no cheaper cut does (Eckart-Young).
        kept = torch.linalg.svdvals(left.T @ (weight.double() - dropped) @ right)
        assert kept[-rank:].max() <= 1e-6 * values[-rank] + 1e-8 * values[0]
    assert longest.largest == pytest.approx(float(torch.linalg.svdvals(weight.double())[0]), rel=0.02)


def test_the_weighted_dropped_part_is_a_projection_of_the_weight() -> None:
    weight = torch.randn(33, 48, generator=torch.Generator().manual_seed(3))
    found = bottom_triplets(weight, 5, weighting=Weighting(covariance_of(tokens("many tokens", 48))))
    left = found.left_OR
    torch.testing.assert_close(left.T @ left, torch.eye(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.matmul(*found.dropped_factors(5)), left @ left.T @ weight, rtol=0, atol=1e-5)


def test_the_weighted_cut_is_another_than_the_plain_one() -> None:
    weight, covariance = torch.randn(24, 24), covariance_of(tokens("many tokens", 24))
    plain, weighted = (
        torch.matmul(*bottom_triplets(weight, 4, weighting=weighting).dropped_factors(4)).double()
        for weighting in (None, Weighting(covariance))
    )
    metric = shrunk(covariance)
    assert (weighted @ metric @ weighted.T).trace() < 0.9 * (plain @ metric @ plain.T).trace()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_equal_directions_give_the_plain_cut(scale: float, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    plain = bottom_triplets(weight, 4)
    equal = bottom_triplets(weight, 4, weighting=Weighting(scale * torch.eye(shape[1]), scale * torch.eye(shape[0])))
    torch.testing.assert_close(
        torch.matmul(*equal.dropped_factors(4)), torch.matmul(*plain.dropped_factors(4)), rtol=0, atol=1e-5
    )
    growth = 1 + SHRINKAGE if scale else 1.0
    torch.testing.assert_close(equal.singular_values_R, growth * plain.singular_values_R)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.2)], ids=str
)
def test_a_covariance_may_have_any_floating_type(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(8)
    weight, covariance = torch.randn(24, 40, generator=generator), covariance_of(tokens("few tokens", 40))
    # Seven tokens for 40 features: rounding to bf16 makes some of the zero eigenvalues clearly negative.
    assert torch.linalg.eigvalsh(covariance.bfloat16().double()).min() < -SHRINKAGE * covariance.trace() / 40
    metric = shrunk(covariance)
    least = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(metric))[-4:].square().sum()
    dropped = torch.matmul(
        *bottom_triplets(weight, 4, weighting=Weighting(covariance.to(dtype))).dropped_factors(4)
    ).double()
    assert (dropped @ metric @ dropped.T).trace() <= (1 + tolerance) * least


@pytest.mark.parametrize(
    ("covariance", "says"),
    [
        (torch.full((6, 6), float("nan")), "NaN or Inf"),
        (torch.full((6, 6), float("inf")), "NaN or Inf"),
        (torch.eye(4), "6 x 6"),
        (torch.eye(6, dtype=torch.int64), "torch.int64"),
        (-torch.eye(6), "negative"),
        (torch.diag(torch.tensor([1.0, 1, 1, 1, 1, -3])), "negative"),
        (torch.diag(torch.tensor([1.0, 1, 1, -1, -1, -1])), "negative"),
    ],
    ids=["nan", "inf", "other width", "int", "negative", "indefinite", "no energy in all"],
)
def test_what_is_no_covariance_is_refused_by_name(covariance: torch.Tensor, says: str) -> None:
    name = "model.layers.3.mlp.up_proj"
    for weight, weighting, side in (
        (torch.ones(4, 6), Weighting(covariance), "inputs"),
        (torch.ones(6, 4), Weighting(torch.eye(4), covariance), "output gradients"),
    ):
        with pytest.raises(SpectrumError) as caught:
            bottom_triplets(weight, 2, name, weighting)
        assert str(caught.value).startswith(f"{name}: ")
        assert says in str(caught.value)
        assert side in str(caught.value)
