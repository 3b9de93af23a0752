"""Folding: the base weight is truncated in place while it lasts, and is the same bits afterwards."""

from pathlib import Path

import pytest
import torch

from kasa import (
    KasaConfig,
    KasaError,
    activate,
    attach,
    attach_saved,
    detach,
    disabled,
    find_targets,
    fold,
    unfold,
)
from tests.kasa import tiny
from tests.kasa.shapes import WIDTHS, Shapes, randomise, weight_of

CONFIG = KasaConfig(rank=6, alpha=9.0, truncation="loss", dropped_rank=4)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def adapted(model: Shapes, spectra: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Attach an adapter; the base weights before."""
    before = {name: tensor.clone() for name, tensor in model.to(dtype).state_dict().items()}
    attach(model, find_targets(model, "all-linear"), CONFIG, spectra)
    randomise(model)
    model.to(dtype)
    return before


def changed(model: Shapes, before: dict[str, torch.Tensor]) -> set[str]:
    """Base tensors that are no longer what they were, bit for bit."""
    now = {
        name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items() if ".updates." not in name
    }
    assert now.keys() == before.keys()
    return {
        name
        for name in before
        if not torch.equal(bits(now[name]), bits(before[name])) or now[name].dtype != before[name].dtype
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: 0.0 and -0.0 are equal numbers."""
    return tensor.contiguous().view(torch.uint8)


WEIGHTS = {f"{name}.weight" for name in WIDTHS}


def outputs(model: Shapes) -> dict[str, torch.Tensor]:
    dtype, generator = model.norm.weight.dtype, torch.Generator().manual_seed(8)
    return {
        name: model.get_submodule(name)(torch.randn(3, WIDTHS[name][0], generator=generator).to(dtype))
        for name in WIDTHS
    }


def test_folded_computes_what_the_residual_form_does(model, spectra) -> None:
    before = adapted(model, spectra)
    residual = outputs(model)
    fold(model)
    assert changed(model, before) == WEIGHTS
    for name, y in outputs(model).items():
        torch.testing.assert_close(y, residual[name], rtol=0, atol=2e-5 * residual[name].abs().max().item())


@DTYPES
def test_unfolded_is_bit_identical_and_the_same_memory(model, spectra, dtype) -> None:
    before = adapted(model, spectra, dtype)
    residual, storage = outputs(model), model.square.base.weight.data_ptr()
    parameter = model.square.base.weight
    fold(model)
    fold(model)
    assert model.square.base.weight is parameter
    unfold(model)
    unfold(model)
    assert changed(model, before) == set()
    assert model.square.base.weight.data_ptr() == storage
    assert all(torch.equal(y, residual[name]) for name, y in outputs(model).items())


@DTYPES
def test_disabling_switching_and_removing_restore_the_base(model, spectra, dtype) -> None:
    before = adapted(model, spectra, dtype)
    fold(model)
    folded = outputs(model)
    with disabled(model):
        assert changed(model, before) == set()
    assert all(torch.equal(y, folded[name]) for name, y in outputs(model).items())

    attach(
        model,
        find_targets(model, "wide"),
        KasaConfig(rank=3, truncation="loss", dropped_rank=2),
        spectra,
        name="second",
    )
    assert changed(model, before) == {"wide.weight"}
    expected = before["wide.weight"].double() - torch.linalg.multi_dot(
        [model.wide.update.dropped_left.double(), model.wide.update.dropped_right.double()]
    )
    torch.testing.assert_close(weight_of(model.wide.base).double(), expected, rtol=1e-2, atol=1e-2)
    activate(model, "default")
    assert changed(model, before) == WEIGHTS
    detach(model)
    assert changed(model, before) == set()


def test_a_change_of_type_keeps_the_whole_weight(model, spectra) -> None:
    before = adapted(model, spectra)
    fold(model)
    model.double()
    assert changed(model, before) == set(before)  # all are of another type now
    unfold(model)
    model.float()
    assert changed(model, before) == set()


def test_gradients_are_those_of_the_residual_form(model, spectra) -> None:
    adapted(model, spectra)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(8))

    def gradients() -> list[torch.Tensor]:
        inputs = x.clone().requires_grad_()
        update = model.square.update
        return list(torch.autograd.grad(model.square(inputs).square().sum(), [inputs, update.a, update.d, update.b]))

    residual = gradients()
    fold(model)
    for ours, theirs in zip(gradients(), residual, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_a_shared_weight_is_refused_and_nothing_is_folded(model, spectra) -> None:
    before = adapted(model, spectra)
    model.tied = torch.nn.Linear(40, 24)
    model.tied.weight = model.wide.base.weight
    with pytest.raises(KasaError, match="wide shares its weight"):
        fold(model)
    del model.tied
    assert changed(model, before) == set()


@DTYPES
def test_a_language_model_is_its_base_again_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny.save_llama(tmp_path / "base")
    model = tiny.load(base).to(dtype)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = tiny.logits(model)

    def is_the_base() -> bool:
        return not changed(model, weights) and torch.equal(bits(tiny.logits(model)), bits(logits))

    attach_saved(model, tiny.make_adapter(base, CONFIG))
    adapted = tiny.logits(model)
    assert (adapted - logits).abs().max() > 0.01 * logits.abs().max()
    with disabled(model):
        assert is_the_base()
    fold(model)
    assert len(changed(model, weights)) == 14
    with disabled(model):
        assert is_the_base()
    unfold(model)
    assert torch.equal(bits(tiny.logits(model)), bits(adapted))
    fold(model)
    detach(model)
    assert is_the_base()
