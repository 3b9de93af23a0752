"""Adapters in transformers models: language models of both weight layouts, and an encoder whose head is trained too."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from kasa import (
    KasaConfig,
    activate,
    attach,
    attach_saved,
    detach,
    disabled,
    find_targets,
    fold,
    read_adapter,
    save_adapter,
)
from kasa.adapter import frozen_factors, trainable_parameters
from kasa.adapter_file import SavedAdapter
from kasa.errors import TargetError
from kasa.spectra import bottom_triplets
from kasa.targets import as_target
from tests.kasa.shapes import randomise
from tests.kasa.tiny import TOKENS, load, logits, save_gpt2, save_llama

CONFIG = KasaConfig(rank=4, alpha=8.0, truncation="loss", dropped_rank=3)
LABELS = torch.tensor([0, 2, 1])


def add(model: nn.Module, name: str = "default", config: KasaConfig = CONFIG, **options) -> nn.Module:
    """An adapter with random values on every linear module."""
    targets = find_targets(model, "all-linear", options.get("trained_modules", ()))
    spectra = {}
    for target in targets:
        module = model.get_submodule(target.name)
        spectra[target.name] = bottom_triplets(module.weight.T if target.transposed else module.weight, 3)
    attach(model, targets, config, spectra, name=name, **options)
    randomise(model, name, 0.1)
    return model


@pytest.fixture(scope="module", params=[save_llama, save_gpt2], ids=["llama", "gpt2"])
def folder(request, tmp_path_factory) -> Path:
    return request.param(tmp_path_factory.mktemp("base"))


def without_dropout(model: nn.Module) -> nn.Module:
    """In training mode, which gradient checkpointing asks for."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def gradients(model: nn.Module, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trainable_parameters(model).items()}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).abs().max() <= tolerance * theirs[name].abs().max(), name


def test_the_base_logits_are_untouched(folder) -> None:
    model = load(folder)
    before = logits(model)
    add(model)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 0.1
    with disabled(model):
        assert torch.equal(logits(model), before)
    fold(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(detach(model)), before)


def test_gradient_checkpointing_changes_no_gradient(folder) -> None:
    model = without_dropout(add(load(folder)))
    plain = gradients(model, use_cache=False)
    assert all(gradient.any() for gradient in plain.values())
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        calls: list[int] = []
        handle = find_layer(model).register_forward_hook(lambda *_, seen=calls: seen.append(1))
        assert_close(gradients(model, use_cache=False), plain, 1e-6)
        handle.remove()
        assert len(calls) == 2, "the layer was not run again in the backward pass"


def find_layer(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if hasattr(module, "updates"))


def test_autocast_computes_in_bf16_and_stays_near(folder) -> None:
    model = without_dropout(add(load(folder)))
    seen: list[torch.dtype] = []
    handle = find_layer(model).register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    plain = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(model)
    handle.remove()
    assert seen == [torch.float32, torch.bfloat16]
    assert all(gradient.dtype == torch.float32 for gradient in mixed.values())
    ours, theirs = (torch.cat([g.flatten() for g in found.values()]) for found in (mixed, plain))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99


def test_compiled_gives_the_same_logits_and_gradients(tmp_path) -> None:
    model = add(load(save_llama(tmp_path)))
    plain = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=False)
    model.zero_grad()
    compiled(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert_close({name: p.grad for name, p in trainable_parameters(model).items()}, plain, 1e-5)


def test_an_adapted_layer_compiles_without_a_break(folder) -> None:
    layer = find_layer(add(load(folder)))
    torch._dynamo.reset()
    x = torch.randn(2, 5, layer.target.in_features)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_the_real_positions_alone(folder, side) -> None:
    model = add(load(folder))
    pads = torch.zeros(len(TOKENS), 4, dtype=torch.long)
    ones = torch.ones_like(TOKENS)
    order = (lambda a, b: torch.cat([a, b], 1)) if side == "left" else (lambda a, b: torch.cat([b, a], 1))
    mask = order(pads, ones)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(input_ids=order(pads, TOKENS), attention_mask=mask, position_ids=positions).logits
    real = padded[:, 4:] if side == "left" else padded[:, :-4]
    torch.testing.assert_close(real, logits(model), rtol=1e-4, atol=1e-4)


def test_a_new_layer_is_in_its_models_mode(folder) -> None:
    model = add(load(folder), config=KasaConfig(rank=4, alpha=8.0, truncation="loss", dropped_rank=3, dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    assert not torch.equal(logits(model.train()), logits(model))


def encoder() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def test_an_encoders_head_is_trained_saved_and_loaded(tmp_path) -> None:
    model = encoder()
    before = logits(model)
    original = model.classifier
    add(model, trained_modules=["classifier"])
    assert torch.equal(original.weight, encoder().classifier.weight)
    parameters = trainable_parameters(model)
    assert {"classifier.weight", "classifier.bias", "bert.pooler.dense.a"} <= parameters.keys()
    assert "classifier.a" not in parameters

    model.train()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    losses = []
    for _ in range(5):
        loss = model(input_ids=TOKENS, labels=LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(parameters["classifier.weight"], start["classifier.weight"])
    trained = logits(model.eval())
    with disabled(model):
        assert torch.equal(logits(model), before)

    tensors, dropped = (
        {name: p.detach() for name, p in found(model).items()} for found in (trainable_parameters, frozen_factors)
    )
    targets = tuple(find_targets(model, "all-linear", ["classifier"]))
    save_adapter(tmp_path / "a", SavedAdapter(CONFIG, targets, "a base", {}, tensors, dropped, ("classifier",)))
    fresh = encoder()
    attach_saved(fresh, read_adapter(tmp_path / "a"))
    assert torch.equal(logits(fresh), trained)
    assert detach(model).classifier is original
    assert torch.equal(logits(model), before)


def test_heads_switch_with_their_adapters() -> None:
    model = encoder()
    first = logits(add(model, "first", trained_modules=["classifier"]))
    second = logits(add(model, "second"))
    activate(model, "first")
    assert torch.equal(logits(model), first)
    activate(model, "second")
    assert torch.equal(logits(model), second)
    assert "classifier.weight" not in trainable_parameters(model)
    assert not model.classifier.updates["first"].weight.requires_grad
    assert model.classifier.weight is model.classifier.base.weight


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("clasifier", "'clasifier' matches no module; .*did you mean classifier"),
        ("dropout", "dropout is a Dropout without parameters"),
    ],
)
def test_trained_modules_that_cannot_be(wanted, says) -> None:
    model = encoder()
    with pytest.raises(TargetError, match=says):
        attach(model, (), CONFIG, trained_modules=[wanted])
    targets = find_targets(model, "all-linear")
    with pytest.raises(TargetError, match="classifier is to be trained whole; leave it out of the targets"):
        attach(model, targets, KasaConfig(truncation="none"), trained_modules=["classifier"])
    assert type(model.classifier) is nn.Linear


def test_modules_that_are_never_called_are_no_targets() -> None:
    attention = nn.MultiheadAttention(32, 4)
    assert as_target("out_proj", attention.out_proj) is None
    assert (
        find_targets(nn.ModuleDict({"attention": attention, "after": nn.Linear(4, 4)}), "all-linear")[0].name == "after"
    )


def test_double_backward_through_a_layer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = find_layer(add(encoder())).double()
    x = torch.randn(2, layer.target.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: layer(z).tanh(), x)
