"""The adapted layer against its own mathematics, and what attaching does to a model."""

import math

import pytest
import torch
from torch.nn import functional

from kasa import KasaConfig, adapted_layers, attach, detach, disabled, find_targets
from kasa.adapter import frozen_factors, load_tensors, trainable_parameters
from kasa.errors import SpectrumError, TargetError
from kasa.spectra import bottom_triplets
from tests.kasa.shapes import WIDTHS, weight_of

NAMES = tuple(WIDTHS)


def trained(model) -> None:
    """Give B (and all else that trains) values as after training: with B = 0 most mistakes do not show."""
    generator = torch.Generator().manual_seed(7)
    for parameter in trainable_parameters(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def inputs(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, WIDTHS[name][0], generator=torch.Generator().manual_seed(8)).to(dtype)


@pytest.mark.parametrize("name", NAMES)
def test_with_b_zero_the_layer_is_the_truncated_base(name: str, model, spectra, config) -> None:
    weight = weight_of(model.get_submodule(name)).double()
    bias = model.get_submodule(name).bias.detach().double()
    layer = attach(model, find_targets(model, name), config, spectra)[name]
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    kept = len(values) - config.dropped_rank
    truncated = left[:, :kept] * values[:kept] @ right[:kept]
    expected = functional.linear(inputs(name).double(), truncated, bias)
    torch.testing.assert_close(layer(inputs(name)).double(), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(layer(inputs(name)).double(), layer.base(inputs(name)).double(), atol=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", NAMES)
def test_the_layer_is_the_merged_weight(
    name: str, dtype: torch.dtype, tolerance: float, model, spectra, config
) -> None:
    attach(model, find_targets(model, "all-linear"), config, spectra)
    trained(model)
    layer = adapted_layers(model.to(dtype))[name]
    update = layer.update
    a, d, b = update.a.double(), update.d.double(), update.b.double()
    base = weight_of(layer.base).double()
    merged = base - update.dropped_left.double() @ update.dropped_right.double() + 9.0 / 6 * b @ torch.diag(d) @ a
    expected = functional.linear(inputs(name, dtype).double(), merged, layer.base.bias.double())
    error = (layer(inputs(name, dtype)).double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_layer_is_a_plain_lora_of_rank_r_plus_dropped_on_the_untouched_base(
    name: str, model, spectra, config
) -> None:
    layer = attach(model.double(), find_targets(model, name), config, spectra)[name].double()
    trained(model)
    update = layer.update
    up = torch.cat([update.scale * update.b * update.d, -update.dropped_left], dim=1)
    down = torch.cat([update.a, update.dropped_right])
    assert up.shape[1] == down.shape[0] == config.rank + config.dropped_rank
    x = inputs(name, torch.float64)
    torch.testing.assert_close(layer(x), layer.base(x) + x @ down.T @ up.T, rtol=0, atol=1e-12)


def test_the_paper_start(model, spectra) -> None:
    config = KasaConfig(rank=6, truncation="loss", dropped_rank=6, singular_value_start="normal")
    layers = attach(model, find_targets(model, "all-linear"), config, spectra, seed=3)
    for layer in layers.values():
        a, b = layer.update.a, layer.update.b
        assert a.abs().max() <= 1 / math.sqrt(a.shape[1])  # kaiming uniform with a = sqrt 5
        assert a.abs().max() > 0.8 / math.sqrt(a.shape[1])
        assert not b.any()
    d = torch.cat([layer.update.d.detach() for layer in layers.values()])
    assert 0.5 < d.std() < 1.6


@pytest.mark.parametrize("name", NAMES)
def test_disabled_is_the_base_bit_for_bit(name: str, model, spectra, config) -> None:
    before = model.get_submodule(name)(inputs(name))
    layer = attach(model, find_targets(model, "all-linear"), config, spectra)[name]
    trained(model)
    with disabled(model):
        assert torch.equal(layer(inputs(name)), before)
    assert not torch.allclose(layer(inputs(name)), before)


def test_disabled_ends_with_an_error_too_and_nests(model, spectra, config) -> None:
    layers = attach(model, find_targets(model, "all-linear"), config, spectra)

    def fail_inside() -> None:
        with disabled(model):
            with disabled(model):
                pass
            assert not any(layer.active for layer in layers.values())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert all(layer.active == "default" for layer in layers.values())


def test_detach_puts_the_same_objects_back(model, spectra, config) -> None:
    before = {name: module for name, module in model.named_modules() if name}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, find_targets(model, "all-linear"), config, spectra)
    trained(model)
    detach(model)
    after = {name: module for name, module in model.named_modules() if name}
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_the_draws_depend_on_seed_and_name_alone(model, spectra, config) -> None:
    targets = find_targets(model, "all-linear")

    def draws(chosen, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(len(chosen))
        attach(model, chosen, config, spectra, seed)
        found = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
        detach(model)
        return found

    forward, backward = draws(targets, 0), draws(targets[::-1], 0)
    assert forward.keys() == backward.keys()
    assert all(torch.equal(forward[name], backward[name]) for name in forward)
    alone = draws(targets[2:3], 0)
    assert all(torch.equal(alone[name], forward[name]) for name in alone)
    other = draws(targets, 1)
    assert not torch.equal(other["square.a"], forward["square.a"])
    assert not torch.equal(forward["square.d"], forward["tall.d"])


def test_what_trains_and_what_is_frozen(model, spectra, config) -> None:
    attach(model, find_targets(model, ["square", "conv"]), config, spectra)
    assert set(trainable_parameters(model)) == {f"{name}.{p}" for name in ("square", "conv") for p in "adb"}
    assert set(frozen_factors(model)) == {
        f"{name}.{p}" for name in ("square", "conv") for p in ("dropped_left", "dropped_right")
    }
    training = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert training == {id(parameter) for parameter in trainable_parameters(model).values()}


def test_nothing_dropped_needs_no_spectra(model) -> None:
    layer = attach(model, find_targets(model, "square"), KasaConfig(rank=3, truncation="none"))["square"]
    assert not frozen_factors(model)
    torch.testing.assert_close(layer(inputs("square")), layer.base(inputs("square")), rtol=0, atol=0)


def test_dropout_touches_the_update_alone_and_only_in_training(model, spectra) -> None:
    config = KasaConfig(rank=6, truncation="loss", dropped_rank=4, dropout=0.5)
    layer = attach(model, find_targets(model, "square"), config, spectra)["square"].train()
    x = inputs("square")
    assert torch.equal(layer(x), layer(x))  # B is zero: no update, so nothing to drop
    trained(model)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_bf16_base_with_fp32_adapter_keeps_the_base_type(model, spectra, config) -> None:
    layer = attach(model.bfloat16(), find_targets(model, "wide"), config, spectra)["wide"]
    trained(model)
    assert layer.update.a.dtype == torch.float32
    assert layer(inputs("wide", torch.bfloat16)).dtype == torch.bfloat16


def test_attach_refuses_a_second_adapter_and_a_wrong_spectrum(model, spectra, config) -> None:
    targets = find_targets(model, ["square", "tall"])
    with pytest.raises(SpectrumError, match="no singular triplets for tall"):
        attach(model, targets, config, {"square": spectra["square"]})
    detach(model)
    with pytest.raises(SpectrumError, match=r"tall needs 4 triplets of a 40 x 24 weight"):
        attach(model, targets, config, spectra | {"tall": spectra["wide"]})
    detach(model)
    with pytest.raises(SpectrumError, match=r"square needs 4 triplets"):
        attach(model, targets, config, spectra | {"square": bottom_triplets(model.square.weight, 3)})
    detach(model)
    attach(model, targets, config, spectra)
    with pytest.raises(TargetError, match="already carries"):
        attach(model, targets, config, spectra)


def test_load_tensors_refuses_other_names_and_shapes(model, spectra, config) -> None:
    attach(model, find_targets(model, "square"), config, spectra)
    good = {name: torch.ones_like(parameter) for name, parameter in trainable_parameters(model).items()}
    load_tensors(model, good)
    assert all(bool((parameter == 1).all()) for parameter in trainable_parameters(model).values())
    renamed = {name.replace("square.b", "square.c"): tensor for name, tensor in good.items()}
    with pytest.raises(TargetError, match=r"square\.[bc] does not fit"):
        load_tensors(model, renamed)
    with pytest.raises(TargetError, match=r"square\.d is \(5,\), the model needs \(6,\)"):
        load_tensors(model, good | {"square.d": torch.ones(5)})
