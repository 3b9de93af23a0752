"""The bottom singular triplets against a full SVD in fp64."""

import dataclasses

import numpy as np
import pytest
import torch

from kasa import bottom, spectra, truncation
from kasa.errors import SpectrumError
from kasa.spectra import bottom_triplets
from kasa.spectra_file import load_spectra, save_spectra
from kasa.weighting import Weighting
from tests.kasa.matrices import SHAPES, spectrum, weight_with_values

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
    assert found.largest == pytest.approx(float(exact[0]), rel=0.02)
    assert found.residual < 1e-12
    assert found.orthogonality < 1e-12


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_prefix_serves_every_smaller_rank(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    long = bottom_triplets(weight, 6)
    for rank in range(1, 7):
        of_long, own = (
            torch.matmul(*triplets.dropped_factors(rank)) for triplets in (long, bottom_triplets(weight, rank))
        )
        torch.testing.assert_close(of_long, own, rtol=0, atol=1e-6)


def test_the_svd_is_the_safety_net(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 60, generator=torch.Generator().manual_seed(3))
    good = bottom_triplets(weight, 4)
    assert good.method == "eigensolver"
    monkeypatch.setattr(spectra, "by_eigensolver", lambda gram, rank: torch.eye(40, rank, dtype=torch.float64))
    rescued = bottom_triplets(weight, 4)
    assert rescued.method == "svd"
    torch.testing.assert_close(rescued.singular_values_R, good.singular_values_R, rtol=1e-6, atol=0)
    monkeypatch.setattr(spectra, "_by_svd", lambda *_: dataclasses.replace(good, residual=1e-3))
    with pytest.raises(SpectrumError, match=r"layer\.7.*1\.0e-03"):
        bottom_triplets(weight, 4, "layer.7")


# Wide enough for the Lanczos route, which smaller weights do not take.

LARGE = truncation.LANCZOS_FROM


def large_spectrum(kind: str) -> torch.Tensor:
    values = {
        "down to zero": torch.linspace(3.0, 0.003, LARGE),
        "far from zero": torch.linspace(1.5, 1.0, LARGE),
        "one apart": torch.cat([torch.linspace(3.0, 1.0, LARGE - 1), torch.tensor([1e-3])]),
        "twenty alike": torch.cat([torch.linspace(3.0, 1.0, LARGE - 20), torch.full((20,), 0.5)]),
    }
    return values[kind].double() if kind in values else spectrum(kind, LARGE)


@pytest.mark.parametrize("shape", [(LARGE, LARGE), (LARGE, LARGE + 300), (LARGE + 300, LARGE)], ids=str)
@pytest.mark.parametrize(
    ("kind", "method"),
    [("down to zero", "lanczos"), ("far from zero", "lanczos"), ("one apart", "lanczos"), ("badly scaled", "svd")],
)
def test_a_large_weight_loses_what_a_full_svd_would_drop(kind: str, method: str, shape: tuple[int, int]) -> None:
    values = large_spectrum(kind)
    weight, rank = weight_with_values(values, shape), 16
    found = bottom_triplets(weight, rank)
    assert found.method == method
    least, limit = float(values[-rank:].norm()), float(1e-12 * values.max())
    dropped = torch.matmul(*(factor.double() for factor in found.dropped_factors(rank)))
    assert float(dropped.norm()) - least <= max(1e-6 * least, limit)
    # The weight's own bottom part, from the bases it was made of.
    bottom_values = torch.where(torch.arange(len(values)) < len(values) - rank, 0.0, values)
    exact = weight_with_values(bottom_values, shape)
    assert float((dropped - exact).norm()) <= max(1e-6 * least, limit)


@pytest.mark.parametrize("kind", ["rank deficient", "zero", "constant", "clustered", "twenty alike"])
def test_a_large_weight_without_gaps_loses_as_little_as_possible(kind: str) -> None:
    values, rank = large_spectrum(kind), 16
    weight = weight_with_values(values, (LARGE, LARGE + 100))
    found = bottom_triplets(weight, rank)
    least, limit = float(values[-rank:].norm()), float(1e-12 * values.max())
    dropped = torch.matmul(*(factor.double() for factor in found.dropped_factors(rank)))
    assert float(dropped.norm()) - least <= max(1e-6 * least, limit)
    left = found.left_OR.double()
    torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)
    # The vectors are stored in fp32.
    assert float((dropped - left @ (left.T @ weight)).norm()) <= 1e-6 * least + 1e-6 * float(values.max())


def test_the_proof_sees_a_missing_vector() -> None:
    values = large_spectrum("down to zero")
    weight = weight_with_values(values, (LARGE, LARGE))
    basis = torch.linalg.qr(bottom_triplets(weight, 17).left_OR.double()).Q
    whole, lacking = basis[:, :16], torch.cat([basis[:, :7], basis[:, 8:17]], dim=1)
    energies = values.flip(0).square()
    assert bottom.is_complete(weight @ weight.T, whole, energies[:16])
    assert not bottom.is_complete(weight @ weight.T, lacking, torch.cat([energies[:7], energies[8:17]]))


def test_what_cannot_be_proved_complete_goes_to_the_eigensolver(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_with_values(large_spectrum("down to zero"), (LARGE, LARGE))
    good = bottom_triplets(weight, 8)
    monkeypatch.setattr(spectra, "is_complete", lambda *_: False)
    other = bottom_triplets(weight, 8)
    assert (good.method, other.method) == ("lanczos", "eigensolver")
    torch.testing.assert_close(other.singular_values_R, good.singular_values_R, rtol=1e-6, atol=0)


def test_a_large_result_repeats_bit_for_bit() -> None:
    weight = weight_with_values(large_spectrum("far from zero"), (LARGE, LARGE)).bfloat16()
    first, second = bottom_triplets(weight, 8), bottom_triplets(weight, 8)
    assert torch.equal(first.left_OR, second.left_OR)
    assert torch.equal(first.right_RI, second.right_RI)


@pytest.mark.parametrize("shape", [(300, 4500), (LARGE, LARGE + 50)], ids=["eigensolver", "lanczos"])
def test_a_device_finds_the_same_by_torch_alone(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(10)).bfloat16()
    here = bottom_triplets(weight, 6)
    # What runs on a device: torch's routines, and a weight wider than a chunk in pieces.
    monkeypatch.setattr(bottom, "_on_cpu", lambda _: False)
    there = bottom_triplets(weight, 6)
    assert there.method == here.method
    torch.testing.assert_close(there.singular_values_R, here.singular_values_R, rtol=1e-6, atol=0)
    products = [torch.matmul(*triplets.dropped_factors(6)) for triplets in (here, there)]
    assert float((products[0] - products[1]).norm()) <= 1e-5 * float(products[0].norm())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(300, 4500), (LARGE + 50, LARGE)], ids=["eigensolver", "lanczos"])
def test_a_cuda_weight_is_decomposed_on_its_device(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(10)).bfloat16()
    for weighting in (None, Weighting(torch.eye(shape[1]), torch.eye(shape[0]))):
        here, there = (bottom_triplets(w, 6, weighting=weighting) for w in (weight, weight.cuda()))
        assert there.left_OR.device.type == "cpu"
        torch.testing.assert_close(there.singular_values_R, here.singular_values_R, rtol=1e-6, atol=0)
        products = [torch.matmul(*triplets.dropped_factors(6)) for triplets in (here, there)]
        assert float((products[0] - products[1]).norm()) <= 1e-5 * float(products[0].norm())


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


@pytest.mark.parametrize("weighted", [False, True])
def test_what_an_adapter_holds_of_spectra_gives_the_same_factors_back(weighted: bool) -> None:
    weight = weight_with_values(spectrum("random", 24), (24, 40))
    inputs = torch.randn(200, 40, generator=torch.Generator().manual_seed(1))
    own = bottom_triplets(weight, 6, weighting=Weighting(inputs.T @ inputs) if weighted else None)
    left, right = own.dropped_factors(4)
    inherited = spectra.inherited_triplets(weight, left, right)
    for given, back in zip((left, right), inherited.dropped_factors(4), strict=True):
        torch.testing.assert_close(back, given, rtol=1e-6, atol=0)
    assert inherited.largest == pytest.approx(own.largest, rel=0.05)
    if not weighted:
        torch.testing.assert_close(inherited.singular_values_R, own.singular_values_R[:4], rtol=1e-5, atol=0)


def test_a_layer_that_drops_nothing_hands_on_nothing() -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    inherited = spectra.inherited_triplets(weight, torch.zeros(8, 0), torch.zeros(0, 12))
    assert [tuple(factor.shape) for factor in inherited.dropped_factors(0)] == [(8, 0), (0, 12)]
