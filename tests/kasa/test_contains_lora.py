"""KaSA contains LoRA: with d at 1, nothing dropped and no penalty it trains as PEFT's LoRA does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from kasa import KasaConfig, attach, find_targets, penalty
from tests.kasa import tiny

STEPS = 12
WITHOUT_PENALTY = KasaConfig(rank=4, alpha=6.0, singular_value_weight=0.0, orthogonality_weight=0.0)


@pytest.mark.parametrize("save", [tiny.save_llama, tiny.save_gpt2])
def test_it_trains_as_lora_does(tmp_path: Path, save) -> None:
    base = save(tmp_path)
    ours, theirs = tiny.load(base), tiny.load(base)
    targets = find_targets(ours, "all-linear")
    config = replace(WITHOUT_PENALTY, singular_values=False)
    layers = attach(ours, targets, config)
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=[target.name for target in targets], fan_in_fan_out=False)
    inject_adapter_in_model(settings, theirs)
    for name, layer in layers.items():
        theirs.get_submodule(name).lora_A["default"].weight.data.copy_(layer.update.a)
    losses = {"ours": train(ours, layers, config), "theirs": train(theirs, {}, config)}
    assert losses["ours"][-1] < losses["ours"][0] - 0.1
    torch.testing.assert_close(losses["ours"], losses["theirs"], rtol=0, atol=1e-6)
    for name, layer in layers.items():
        lora = theirs.get_submodule(name)
        torch.testing.assert_close(layer.update.a.detach(), lora.lora_A["default"].weight.detach(), rtol=0, atol=2e-5)
        torch.testing.assert_close(layer.update.b.detach(), lora.lora_B["default"].weight.detach(), rtol=0, atol=2e-5)


def test_with_a_learned_d_the_first_step_is_that_of_lora(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path)
    learned, fixed = (
        train(model, attach(model, find_targets(model, "all-linear"), config), config, steps=2)
        for config in (WITHOUT_PENALTY, replace(WITHOUT_PENALTY, singular_values=False))
        for model in [tiny.load(base)]
    )
    assert torch.equal(learned, fixed)


def train(model: nn.Module, layers, config: KasaConfig, steps: int = STEPS) -> torch.Tensor:
    """The loss of every step."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A large epsilon, so that rounding in gradients near zero does not become steps of full size.
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, eps=1e-4, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss
        regulariser = penalty(layers.values(), config.regulariser).weighted(config) if layers else 0.0
        (loss + regulariser).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)
