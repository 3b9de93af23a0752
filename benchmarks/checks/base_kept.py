"""What an adapter leaves of its base, and that a packed base is as good as a plain one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.checks.interchange import difference, random_adapter
from benchmarks.core import CannotRunError, Measurement, Setting, check
from benchmarks.texts import TokenRows, text_sets, token_rows
from kasa import (
    KasaConfig,
    KasaError,
    ModelWeights,
    attach,
    attach_saved,
    compute_spectra,
    detach,
    disabled,
    find_targets,
    fold,
    observe_layers,
    penalty,
    unfold,
)
from kasa.adapter import trainable_parameters
from pipeline.config.settings import BaseSettings
from pipeline.models.base import BaseModel, find_base
from pipeline.models.loading import DTYPES, load_base
from pipeline.models.prompting import load_tokenizer

RANK, ALPHA = 16, 32.0
CALIBRATION_TOKENS, BATCH = 2048, 2
STEPS, LEARNING_RATE = 6, 1e-3
EXPECTED_LAYERS = 210


@check(bar=0, direction="at most", unit="elements that differ")
def non_destructive(setting: Setting) -> Measurement:
    """Base logits and all weights bit for bit with an adapter disabled, folded then restored, and removed; fp32 and bf16."""
    base = _base(setting)
    adapter = random_adapter(base, "weight")
    tokens = torch.tensor(_rows(setting, base)[:BATCH])
    found = {}
    for precision in DTYPES:
        model = load_base(base.folder, precision)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        logits = _logits(model, tokens)
        differing: dict[str, int] = {}

        attach_saved(model, adapter)
        adapted = _logits(model, tokens)
        with disabled(model):
            differing["disabled"] = _differing_in_all(model, tokens, weights, logits)
        fold(model)
        folded, truncated = _logits(model, tokens), _differing_weights(model, weights)
        with disabled(model):
            differing["folded, disabled"] = _differing_in_all(model, tokens, weights, logits)
        unfold(model)
        differing["unfolded, adapter"] = different_bits(_logits(model, tokens), adapted)
        fold(model)
        detach(model)
        differing["folded, removed"] = _differing_in_all(model, tokens, weights, logits)
        found[precision] = {
            "differing": differing,
            "adapter_changes_logits": difference([adapted], [logits]),
            "folding_changes_elements": truncated,
            "folded_to_residual": difference([folded], [adapted]),
        }
    return kept_of(found)


@check(bar=1e-4, direction="at most", unit="of the largest logit")
def quantised_base(setting: Setting) -> Measurement:
    """KaSA trained on a 4-bit bitsandbytes SmolLM2-135M, its logits against the same adapter on the unpacked weights.

    The packing is the same on both sides, so what may differ is fp32 rounding alone, far less than what packing itself
    changes (`packing_changes_logits`).
    """
    base = _base(setting)
    rows = _rows(setting, base)
    tokens = torch.tensor(rows[:BATCH])
    plain, packed = load_base(base.folder, "fp32"), _packed(base)
    targets = find_targets(plain, "all-linear")
    with observe_layers(plain, targets) as sums:
        for row in rows:
            _logits(plain, torch.tensor([row]))
    spectra = compute_spectra(ModelWeights(plain), targets, RANK, weighting=sums.weighting)
    config = KasaConfig(RANK, ALPHA, truncation="activation", dropped_rank=RANK)
    change = difference([_logits(packed, tokens)], [_logits(plain, tokens)])
    ignored = _peft_diagonals(base)

    layers = attach(packed, targets, config, spectra)
    trained = trainable_parameters(packed)
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        loss = packed(input_ids=tokens, labels=tokens).loss
        (loss + penalty(layers.values(), config.regulariser).weighted(config)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    twin = _unpacked(packed, plain)
    attach(twin, targets, config, spectra)
    with torch.no_grad():
        for name, parameter in trainable_parameters(twin).items():
            parameter.copy_(trained[name])
    unmoved = [name for name, value in start.items() if torch.equal(value, trained[name])]
    apart = difference([_logits(packed, tokens)], [_logits(twin, tokens)])
    details = {
        "layers": len(layers),
        "losses": losses,
        "unmoved_tensors": unmoved,
        "packing_changes_logits": change,
        **ignored,
    }
    return quantised_of(apart, details)


def kept_of(found: Mapping[str, Mapping[str, Any]]) -> Measurement:
    """Elements that differ, in all states and precisions together; an adapter that changes nothing proves nothing."""
    flaws = [
        f"in {precision} the adapter or its folding changes nothing"
        for precision, values in found.items()
        if values["adapter_changes_logits"] < 0.01 or not values["folding_changes_elements"]
    ]
    total = sum(sum(values["differing"].values()) for values in found.values())
    return Measurement(total, dict(found), flaws=tuple(flaws))


def quantised_of(apart: float, details: dict[str, Any]) -> Measurement:
    """The logits' distance; not training is a flaw."""
    flaws = []
    if details["layers"] != EXPECTED_LAYERS:
        flaws.append(f"{details['layers']} layers, not {EXPECTED_LAYERS}")
    if details["losses"][-1] >= 0.95 * details["losses"][0]:
        flaws.append(f"the loss went from {details['losses'][0]:.3f} to {details['losses'][-1]:.3f} only")
    if details["unmoved_tensors"]:
        flaws.append(f"{len(details['unmoved_tensors'])} tensors did not move")
    return Measurement(apart, details, flaws=tuple(flaws))


def different_bits(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """How many elements of two tensors of one type and shape are not the same bits."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    as_bits = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    return int((ours.contiguous().view(as_bits) != theirs.contiguous().view(as_bits)).sum())


def _differing_in_all(
    model: nn.Module, tokens: torch.Tensor, weights: Mapping[str, torch.Tensor], logits: torch.Tensor
) -> int:
    return _differing_weights(model, weights) + different_bits(_logits(model, tokens), logits)


def _differing_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> int:
    now = {
        name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items() if ".updates." not in name
    }
    assert now.keys() == weights.keys()
    return sum(different_bits(now[name], weights[name]) for name in weights)


@torch.no_grad()
def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens).logits


def _packed(base: BaseModel) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        base.folder, dtype=torch.float32, quantization_config=packing, local_files_only=True
    )
    # Outside training bitsandbytes computes in bf16 on CPUs that can, and stores the weights in another order for it.
    return model.train()


def _unpacked(packed: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain` with the weights that the adapted layers of `packed` stand for."""
    from bitsandbytes.functional import dequantize_4bit

    for target in find_targets(plain, "all-linear"):
        weight: Any = packed.get_parameter(f"{target.name}.base.weight")
        plain.get_parameter(f"{target.name}.weight").data = dequantize_4bit(weight.data, weight.quant_state).float()
    return plain


def _peft_diagonals(base: BaseModel) -> dict[str, int]:
    """What PEFT makes of `kasa_config` on such a base: trained A, and the d beside them."""
    from peft import KasaConfig as PeftKasaConfig
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, target_modules="all-linear", kasa_config=PeftKasaConfig())
    names = [name for name, _ in get_peft_model(_packed(base), config).named_parameters()]
    return {
        "peft_lora_a": sum("lora_A" in name for name in names),
        "peft_kasa_d": sum("lora_diag" in name for name in names),
    }


def _rows(setting: Setting, base: BaseModel) -> TokenRows:
    texts, _ = text_sets(setting.workspace)["python reference"]
    return token_rows(texts, load_tokenizer(base.folder), CALIBRATION_TOKENS)


def _base(setting: Setting) -> BaseModel:
    try:
        import bitsandbytes  # noqa: F401  (development dependencies)
        import peft  # noqa: F401

        base = find_base(BaseSettings(), setting.workspace)
    except (KasaError, ImportError) as error:
        raise CannotRunError(str(error)) from None
    assert base is not None
    return base
