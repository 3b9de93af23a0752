"""The bottom singular triplets against a full SVD in fp64."""

import dataclasses

import numpy as np
import pytest
import torch

from kasa import SpectrumError, bottom_triplets, load_spectra, save_spectra, spectra

SHAPES = {"square": (48, 48), "tall": (80, 33), "wide": (33, 80), "tiny": (6, 9)}


def weight_with_values(values: torch.Tensor, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A matrix of the given singular values between random orthonormal bases, fp64."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator, dtype=torch.float64)).Q
    return left * values @ right.T


def spectrum(kind: str, count: int) -> torch.Tensor:
    values = {
        "random": torch.linspace(3.0, 0.2, count, dtype=torch.float64) ** 2,
        "rank deficient": torch.cat([torch.linspace(3, 1, count - count // 2), torch.zeros(count // 2)]),
        "zero": torch.zeros(count),
        "constant": torch.full((count,), 2.0),
        "clustered": 1 + 1e-9 * torch.arange(count, 0, -1, dtype=torch.float64),
        "badly scaled": torch.logspace(0, -8, count, dtype=torch.float64),
    }
    return values[kind].double()


KINDS = ("random", "rank deficient", "zero", "constant", "clustered", "badly scaled")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dropped_energy_is_the_least_possible(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rank = 5
    weight = weight_with_values(spectrum(kind, min(shape)), shape).to(dtype)
    exact = torch.linalg.svdvals(weight.double())
    left_OR, right_RI = bottom_triplets(weight, rank).dropped_factors(rank)
    assert left_OR.dtype == right_RI.dtype == torch.float32

    kept = weight.double() - left_OR.double() @ right_RI.double()
    dropped_energy = (left_OR.double() @ right_RI.double()).square().sum()
    least = exact[-rank:].square().sum()
    # Eckart-Young: removing the r smallest takes this much energy and leaves all of the rest. The factors are stored in
    # fp32, so their rounding, relative to the dropped part itself, is the tolerance.
    tolerance = 1e-6 * least + (1e-12 * exact[0]) ** 2
    assert abs(dropped_energy - least) <= tolerance
    assert torch.linalg.svdvals(kept)[-rank:].max() <= 1e-6 * exact[-rank] + 1e-12 * exact[0]
    assert abs(kept.square().sum() - exact[:-rank].square().sum()) <= 1e-6 * least + 1e-12 * exact[0] ** 2


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_triplets_are_singular_triplets_smallest_first(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = bottom_triplets(weight, 5)
    left, values, right = (t.double() for t in (found.left_OR, found.singular_values_R, found.right_RI))
    exact = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(values, exact.flip(0)[:5], rtol=1e-6, atol=0)
    torch.testing.assert_close(left.T @ left, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(right @ right.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(weight.double() @ right.T, left * values, rtol=0, atol=1e-5)
    assert found.largest == pytest.approx(float(exact[0]), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_prefix_serves_every_smaller_rank(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    long = bottom_triplets(weight, 6)
    for rank in range(1, 7):
        of_long, own = (
            torch.matmul(*triplets.dropped_factors(rank)) for triplets in (long, bottom_triplets(weight, rank))
        )
        torch.testing.assert_close(of_long, own, rtol=0, atol=1e-6)


def test_the_gram_route_is_taken_and_the_svd_is_its_safety_net(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 60, generator=torch.Generator().manual_seed(3))
    good = bottom_triplets(weight, 4)
    assert good.method == "gram"
    monkeypatch.setattr(spectra, "_by_gram", lambda *_: dataclasses.replace(good, residual=1e-3))
    rescued = bottom_triplets(weight, 4)
    assert rescued.method == "svd"
    torch.testing.assert_close(rescued.singular_values_R, good.singular_values_R, rtol=1e-6, atol=0)
    monkeypatch.setattr(spectra, "_by_svd", lambda *_: dataclasses.replace(good, residual=1e-3))
    with pytest.raises(SpectrumError, match=r"layer\.7.*1\.0e-03"):
        bottom_triplets(weight, 4, "layer.7")


def test_the_result_repeats_bit_for_bit() -> None:
    weight = torch.randn(40, 60, generator=torch.Generator().manual_seed(4))
    first, second = bottom_triplets(weight, 4), bottom_triplets(weight, 4)
    assert torch.equal(first.left_OR, second.left_OR)
    assert torch.equal(first.right_RI, second.right_RI)
    assert first.largest == second.largest


@pytest.mark.parametrize(
    ("weight", "rank", "says"),
    [
        (torch.tensor([[1.0, float("nan")], [0, 1]]), 1, "NaN or Inf"),
        (torch.tensor([[1.0, float("inf")], [0, 1]]), 1, "NaN or Inf"),
        (torch.ones(4, 4, dtype=torch.int64), 1, "torch.int64"),
        (torch.ones(4, 4, 4), 1, "(4, 4, 4)"),
        (torch.ones(4, 6), 5, "between 1 and 4"),
        (torch.ones(4, 6), 0, "between 1 and 4"),
    ],
    ids=["nan", "inf", "int", "cube", "rank too large", "rank 0"],
)
def test_what_cannot_be_decomposed_is_refused_by_name(weight: torch.Tensor, rank: int, says: str) -> None:
    with pytest.raises(SpectrumError) as caught:
        bottom_triplets(weight, rank, "model.layers.3.mlp.up_proj")
    assert str(caught.value).startswith("model.layers.3.mlp.up_proj: ")
    assert says in str(caught.value)


def test_full_rank_gives_the_whole_weight() -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(torch.matmul(*bottom_triplets(weight, 12).dropped_factors(12)), weight)


def test_saved_spectra_come_back_whole(tmp_path) -> None:
    found = {"a": bottom_triplets(torch.randn(12, 20), 3), "b.c": bottom_triplets(torch.randn(20, 12), 3)}
    save_spectra(tmp_path / "s", found, {"a": "digest of a", "b.c": "digest of b"})
    loaded, digests = load_spectra(tmp_path / "s")
    assert digests == {"a": "digest of a", "b.c": "digest of b"}
    for name, triplets in found.items():
        for field in dataclasses.fields(triplets):
            np.testing.assert_array_equal(getattr(loaded[name], field.name), getattr(triplets, field.name))


# Weighted by the covariance of the layer's input.


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
    return covariance / covariance.diagonal().mean() + spectra.SHRINKAGE * torch.eye(len(covariance))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("inputs", ["many tokens", "few tokens", "dead features"])
@pytest.mark.parametrize("kind", ["random", "rank deficient", "zero", "constant", "badly scaled"])
def test_the_weighted_cut_changes_the_output_least(kind: str, inputs: str, shape: tuple[int, int]) -> None:
    weight = weight_with_values(spectrum(kind, min(shape)), shape).float()
    covariance = covariance_of(tokens(inputs, shape[1]))
    weighting = shrunk(covariance)
    weighted = torch.linalg.svd(weight.double() @ torch.linalg.cholesky(weighting))
    longest = bottom_triplets(weight, 5, covariance_II=covariance)
    for rank in range(1, 6):
        left_OR, right_RI = (factor.double() for factor in longest.dropped_factors(rank))
        dropped = left_OR @ right_RI
        output_energy = (dropped @ weighting @ dropped.T).trace()
        least = weighted.S[-rank:].square().sum()
        assert output_energy <= least * (1 + 1e-5) + (1e-8 * weighted.S[0]) ** 2
        # Removing it takes the rank down: no cut of less output energy does (Eckart-Young).
        kept = torch.linalg.svdvals((weight.double() - dropped) @ torch.linalg.cholesky(weighting))
        assert kept[-rank:].max() <= 1e-6 * weighted.S[-rank] + 1e-8 * weighted.S[0]


def test_the_weighted_dropped_part_is_a_projection_of_the_weight() -> None:
    weight = torch.randn(33, 48, generator=torch.Generator().manual_seed(3))
    found = bottom_triplets(weight, 5, covariance_II=covariance_of(tokens("many tokens", 48)))
    left = found.left_OR
    torch.testing.assert_close(left.T @ left, torch.eye(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.matmul(*found.dropped_factors(5)), left @ left.T @ weight, rtol=0, atol=1e-5)


def test_the_weighted_cut_is_another_than_the_plain_one() -> None:
    weight, covariance = torch.randn(24, 24), covariance_of(tokens("many tokens", 24))
    plain, weighted = (
        torch.matmul(*bottom_triplets(weight, 4, covariance_II=c).dropped_factors(4)).double()
        for c in (None, covariance)
    )
    weighting = shrunk(covariance)
    assert (weighted @ weighting @ weighted.T).trace() < 0.9 * (plain @ weighting @ plain.T).trace()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_equal_inputs_give_the_plain_cut(scale: float, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    plain = bottom_triplets(weight, 4)
    equal = bottom_triplets(weight, 4, covariance_II=scale * torch.eye(shape[1]))
    torch.testing.assert_close(
        torch.matmul(*equal.dropped_factors(4)), torch.matmul(*plain.dropped_factors(4)), rtol=0, atol=1e-5
    )
    growth = (1 + spectra.SHRINKAGE) ** 0.5 if scale else 1.0
    torch.testing.assert_close(equal.singular_values_R, growth * plain.singular_values_R)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.2)], ids=str
)
def test_a_covariance_may_have_any_floating_type(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(8)
    weight, covariance = torch.randn(24, 40, generator=generator), covariance_of(tokens("few tokens", 40))
    # Seven tokens for 40 features: rounding to bf16 makes some of the zero eigenvalues clearly negative.
    assert torch.linalg.eigvalsh(covariance.bfloat16().double()).min() < -spectra.SHRINKAGE * covariance.trace() / 40
    weighting = shrunk(covariance)
    least = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(weighting))[-4:].square().sum()
    dropped = torch.matmul(*bottom_triplets(weight, 4, covariance_II=covariance.to(dtype)).dropped_factors(4)).double()
    assert (dropped @ weighting @ dropped.T).trace() <= (1 + tolerance) * least


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
    with pytest.raises(SpectrumError) as caught:
        bottom_triplets(torch.ones(4, 6), 2, "model.layers.3.mlp.up_proj", covariance)
    assert str(caught.value).startswith("model.layers.3.mlp.up_proj: ")
    assert says in str(caught.value)
