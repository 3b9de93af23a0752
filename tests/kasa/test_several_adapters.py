"""Several adapters on one base: each computes what it computes alone, and the base stays what it was."""

import pytest
import torch

from kasa import KasaConfig, activate, adapted_layers, attach, detach, disabled, find_targets, penalty
from kasa.adapter import adapter_names, frozen_factors, trainable_parameters
from kasa.errors import TargetError
from kasa.layer import KasaLayer
from tests.kasa.shapes import WIDTHS, Shapes, randomise

FIRST = KasaConfig(rank=6, alpha=9.0, truncation="loss", dropped_rank=4)
SECOND = KasaConfig(rank=3, alpha=6.0, truncation="loss", dropped_rank=2)
FIRST_TARGETS, SECOND_TARGETS = ["square", "tall", "conv"], ["square", "wide"]


def outputs(model: Shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {name: model.get_submodule(name)(torch.randn(3, WIDTHS[name][0], generator=generator)) for name in WIDTHS}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in ours if torch.equal(ours[name], theirs[name])}


def add(model: Shapes, spectra: dict, name: str) -> None:
    wanted, config = (FIRST_TARGETS, FIRST) if name == "first" else (SECOND_TARGETS, SECOND)
    attach(model, find_targets(model, wanted), config, spectra, name=name)
    randomise(model, name)


@pytest.fixture
def alone(model, spectra) -> dict[str, dict[str, torch.Tensor]]:
    """What the model computes without and with each adapter by itself."""
    found = {"base": outputs(model)}
    for name in ("first", "second"):
        add(model, spectra, name)
        found[name] = outputs(model)
        detach(model)
    return found


@pytest.fixture
def both(model, spectra, alone) -> Shapes:
    add(model, spectra, "first")
    add(model, spectra, "second")
    return model


def test_each_computes_what_it_computes_alone(both, alone) -> None:
    assert adapter_names(both) == ["first", "second"]
    for name in ("second", "first", "second"):
        activate(both, name)
        assert same(outputs(both), alone[name]) == set(WIDTHS)
    assert same(alone["first"], alone["base"]) == {"wide"}
    assert same(alone["second"], alone["base"]) == {"tall", "conv"}


def test_disabled_is_the_base_and_ends_with_the_same_adapter(both, alone) -> None:
    activate(both, "first")
    with disabled(both):
        assert same(outputs(both), alone["base"]) == set(WIDTHS)
    assert same(outputs(both), alone["first"]) == set(WIDTHS)


def test_one_is_removed_and_then_the_other(both, alone, model) -> None:
    detach(both, "second")
    assert same(outputs(both), alone["base"]) == set(WIDTHS)  # it was the active one
    assert set(adapted_layers(both)) == set(FIRST_TARGETS)
    activate(both, "first")
    assert same(outputs(both), alone["first"]) == set(WIDTHS)
    detach(both, "first")
    assert not any(isinstance(module, KasaLayer) for module in both.modules())
    assert same(outputs(both), alone["base"]) == set(WIDTHS)


def test_removing_one_leaves_the_active_other_in_force(both, alone) -> None:
    detach(both, "first")
    assert same(outputs(both), alone["second"]) == set(WIDTHS)


def test_only_the_active_one_trains(both) -> None:
    for name in ("first", "second"):
        activate(both, name)
        training = {id(parameter) for parameter in both.parameters() if parameter.requires_grad}
        assert training == {id(parameter) for parameter in trainable_parameters(both, name).values()}


def test_parameters_of_either_by_name_and_of_the_active_one_without(both) -> None:
    assert set(trainable_parameters(both, "first")) == {f"{t}.{p}" for t in FIRST_TARGETS for p in "adb"}
    assert set(trainable_parameters(both)) == {f"{t}.{p}" for t in SECOND_TARGETS for p in "adb"}
    assert frozen_factors(both)["wide.dropped_right"].shape == (2, 40)
    assert frozen_factors(both, "first")["square.dropped_left"].shape == (24, 4)
    with disabled(both), pytest.raises(TargetError, match="carries first, second, and none is active"):
        trainable_parameters(both)


def test_the_penalty_is_that_of_the_active_one(both) -> None:
    activate(both, "first")
    found = penalty(adapted_layers(both).values(), "paper")
    squares = sum(float(p.detach().square().sum()) for key, p in trainable_parameters(both).items() if key[-1] == "d")
    assert found.singular_value.item() == pytest.approx(squares, rel=1e-6)


def test_a_module_used_in_two_places_is_adapted_in_both(spectra) -> None:
    model = Shapes()
    model.again = model.square
    attach(model, find_targets(model, "square"), FIRST, spectra)
    assert model.again is model.square
    assert isinstance(model.again, KasaLayer)
    detach(model)
    assert model.again is model.square
    assert isinstance(model.again, torch.nn.Linear)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "train"])
def test_names_that_torch_cannot_hold(model, spectra, name) -> None:
    with pytest.raises(TargetError, match="cannot name an adapter"):
        attach(model, find_targets(model, "square"), FIRST, spectra, name=name)
    assert not adapted_layers(model)


def test_unknown_and_taken_names(both, spectra) -> None:
    for change in (activate, detach, trainable_parameters):
        with pytest.raises(TargetError, match="no adapter 'fist', only first, second; did you mean first"):
            change(both, "fist")
    with pytest.raises(TargetError, match="already carries an adapter 'first'"):
        attach(both, find_targets(both, "square"), FIRST, spectra, name="first")
