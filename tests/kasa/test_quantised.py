"""Adapters on bitsandbytes layers: the same update beside a packed weight."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from kasa import KasaConfig, KasaError, adapted_layers, attach, attach_saved, disabled, find_targets, fold, penalty
from kasa.adapter import trainable_parameters
from kasa.adapter_file import SavedAdapter
from kasa.errors import AdapterFileError
from kasa.spectra import bottom_triplets
from kasa.targets import Target
from tests.kasa.shapes import randomise
from tests.kasa.tiny import TOKENS, assert_same, load, logits, save_llama

CONFIG = KasaConfig(rank=4, alpha=8.0, truncation="loss", dropped_rank=3)
KINDS = ["4bit", "8bit"]


def packed(linear: nn.Linear, kind: str) -> nn.Module:
    shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if kind == "4bit":
        module = bitsandbytes.nn.Linear4bit(*shape, bias=bias, quant_type="nf4", compute_dtype=torch.float32)
    else:
        module = bitsandbytes.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
    module.load_state_dict(linear.state_dict())
    return module.to("cpu")


def unpacked(module: nn.Module) -> nn.Linear:
    """What the packed module stands for, as a plain one."""
    plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    else:
        module(torch.zeros(1, module.in_features))  # moves the scales to where they are read
        weight = module.state.CB.float() * module.state.SCB[:, None] / 127
    plain.weight.data = weight.float()
    if module.bias is not None:
        plain.bias.data = module.bias.data
    return plain


def replaced(model: nn.Module, make) -> nn.Module:
    for target in find_targets(model, "all-linear"):
        model.set_submodule(target.name, make(model.get_submodule(target.name)))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def spectra(folder) -> dict:
    """Of the original weights."""
    model = load(folder)
    return {t.name: bottom_triplets(model.get_submodule(t.name).weight, 3) for t in find_targets(model, "all-linear")}


@pytest.fixture(params=KINDS)
def quantised(request, folder) -> nn.Module:
    return replaced(load(folder), lambda linear: packed(linear, request.param))


def test_targets_are_the_originals(quantised, folder) -> None:
    assert find_targets(quantised, "all-linear") == find_targets(load(folder), "all-linear")


def test_the_model_is_its_unpacked_self_with_the_same_adapter(quantised, spectra, folder) -> None:
    twin = load(folder)
    for target in find_targets(quantised, "all-linear"):
        twin.set_submodule(target.name, unpacked(quantised.get_submodule(target.name)))
    before = logits(quantised)
    for model in (quantised, twin):
        attach(model, find_targets(model, "all-linear"), CONFIG, spectra)
        randomise(model, scale=0.3)
    assert (logits(quantised) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(quantised), logits(twin), rtol=0, atol=1e-4)
    with disabled(quantised):
        assert torch.equal(logits(quantised), before)


def trained(model: nn.Module) -> None:
    """Train the adapter for six steps; the loss falls, and every tensor moves."""
    parameters = trainable_parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        regularised = loss + penalty(adapted_layers(model).values(), "authors").weighted(CONFIG)
        optimizer.zero_grad()
        regularised.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(not torch.equal(parameter, start[name]) for name, parameter in parameters.items())


def test_it_trains_and_the_packed_weights_stay(quantised, spectra) -> None:
    weights = {
        t.name: quantised.get_submodule(t.name).weight.data.clone() for t in find_targets(quantised, "all-linear")
    }
    attach(quantised, find_targets(quantised, "all-linear"), CONFIG, spectra)
    trained(quantised)
    for name, weight in weights.items():
        assert torch.equal(quantised.get_submodule(name).base.weight.data, weight)


def test_a_base_that_transformers_packed_trains_and_is_its_unpacked_self(spectra, folder) -> None:
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=packing)
    # Outside training bitsandbytes computes in bf16 on CPUs that can, and stores the weights in another order for it.
    model.train()
    twin = load(folder)
    targets = find_targets(model, "all-linear")
    for target in targets:
        twin.set_submodule(target.name, unpacked(model.get_submodule(target.name)))
    attach(model, targets, CONFIG, spectra)
    trained(model)
    attach(twin, targets, CONFIG, spectra)
    with torch.no_grad():
        for name, parameter in trainable_parameters(twin).items():
            parameter.copy_(trainable_parameters(model)[name])
    assert len(targets) == 14
    assert_same(logits(model), logits(twin), 1e-4)


def test_folding_is_refused_and_leaves_all_as_it_was(quantised, spectra) -> None:
    attach(quantised, find_targets(quantised, "all-linear"), CONFIG, spectra)
    before = logits(quantised)
    with pytest.raises(KasaError, match=r"q_proj is a Linear(4bit|8bitLt) without a plain weight"):
        fold(quantised)
    assert torch.equal(logits(quantised), before)


def test_a_saved_adapter_fits_the_packed_base_too(quantised, spectra, folder) -> None:
    model = load(folder)
    targets = tuple(find_targets(model, "all-linear"))
    attach(model, targets, CONFIG, spectra)
    tensors = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    dropped = {}
    for name, triplets in spectra.items():
        dropped[f"{name}.dropped_left"], dropped[f"{name}.dropped_right"] = triplets.dropped_factors(3)
    adapter = SavedAdapter(CONFIG, targets, "a base", {}, tensors, dropped)
    attach_saved(quantised, adapter)
    assert trainable_parameters(quantised).keys() == tensors.keys()

    wrong = SavedAdapter(CONFIG, (Target(targets[0].name, 24, 32),), "a base", {}, tensors, dropped)
    with pytest.raises(AdapterFileError, match="q_proj is 32 x 32, the adapter's is 24 x 32"):
        attach_saved(quantised, wrong, "wrong")
