"""Estimates against counted modules, hand-computed bytes, and what autograd really keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from pipeline.memory import (
    GIB,
    BlockShape,
    activation_bytes,
    block_shape,
    gathered_bytes,
    logits_bytes,
    optimizer_bytes,
)
from pipeline.model_shapes import meta_model, model_config
from pipeline.plan import Estimate, estimate, frozen_factor_parameters, trainable_parameters
from pipeline.recipe import Recipe, TrainSettings, parse_recipe
from pipeline.training.batches import optimizer_steps

RANK = 4


def _recipe(**sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {"name": "t", "data": {"train": "x.jsonl"}}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return parse_recipe(values, "test")


def _linears(model: nn.Module) -> list[tuple[str, int, int]]:
    return [
        (name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    ]


class _Adapted(nn.Module):
    """A frozen linear layer with the adapter's tensors, written anew from the method's formula."""

    def __init__(self, base: nn.Linear, rank: int, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.a = nn.Parameter(torch.randn(rank, base.in_features))
        self.d = nn.Parameter(torch.randn(rank))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.dropped_left = nn.Parameter(torch.randn(base.out_features, 2), requires_grad=False)
        self.dropped_right = nn.Parameter(torch.randn(2, base.in_features), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = functional.linear(functional.linear(self.dropout(x), self.a) * (2.0 * self.d), self.b)
        return self.base(x) + update - functional.linear(functional.linear(x, self.dropped_right), self.dropped_left)


def _small_llama(kv_heads: int = 2) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=128,
    )


def _adapt(model: nn.Module, suffixes: tuple[str, ...], dropout: float = 0.0) -> list[tuple[str, int, int]]:
    adapted = [entry for entry in _linears(model) if entry[0].endswith(suffixes)]
    for name, _, _ in adapted:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _Adapted(model.get_submodule(name), RANK, dropout))
    return adapted


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_counts_match_a_real_adapted_model() -> None:
    model = LlamaForCausalLM(_small_llama()).requires_grad_(False)
    base = sum(p.numel() for p in model.parameters())
    adapted = _adapt(model, ALL)
    assert len(adapted) == 28
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable_parameters(adapted, RANK) == trained
    everything = sum(p.numel() for p in model.parameters())
    assert frozen_factor_parameters(adapted, 2) == everything - base - trained


def test_llama_2_7b_with_the_papers_targets() -> None:
    """r = 32 on q, k, v, up, down: 3 (4096 + 4096) + 2 (4096 + 11008) = 54784 features and 5 diagonals per layer."""
    config = model_config("meta-llama/Llama-2-7b-hf")
    assert config is not None
    model = meta_model(config)
    wanted = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    adapted = [entry for entry in _linears(model) if entry[0].endswith(wanted)]
    recipe = _recipe(
        base={"model": "meta-llama/Llama-2-7b-hf"},
        adapter={"rank": 32, "alpha": 64},
        train={"workers": 4, "batch_size": 16, "micro_batch_size": 2},
    )
    result = estimate(recipe, model, adapted, zero_stage=3, offload=False, train_rows=170_420)
    assert result.base_parameters == 6_738_415_616
    assert result.trainable_parameters == 32 * (32 * 54784 + 32 * 5) == 56_103_936
    assert result.frozen_factor_parameters == 32 * 32 * 54784
    assert result.trainable_share == pytest.approx(0.008326, rel=1e-3)
    assert result.adapted_modules == 160
    memory = {item.kind: item.gib for item in result.memory}
    assert memory["base weights"] == pytest.approx(6_738_415_616 * 2 / 4 / GIB)
    assert memory["optimizer states"] == pytest.approx(56_103_936 * 12 / 4 / GIB)
    assert memory["gradients"] == pytest.approx(56_103_936 * 2 / 4 / GIB)
    assert memory["adapter"] == pytest.approx(56_103_936 * 2 / GIB)
    assert result.checkpoint_gib == pytest.approx(56_103_936 * 12 / GIB)
    assert result.optimizer_steps == 10_652
    assert result.gradient_accumulation == 2


@pytest.mark.parametrize(
    ("stage", "gradients", "states"),
    [(0, 2.0, 12.0), (1, 2.0, 3.0), (2, 0.5, 3.0), (3, 0.5, 3.0)],
)
def test_zero_stages_divide_what_they_partition(stage: int, gradients: float, states: float) -> None:
    model = meta_model(_small_llama())
    recipe = _recipe(train={"workers": 4, "micro_batch_size": 1})
    result = estimate(recipe, model, _linears(model), zero_stage=stage, offload=False, train_rows=None)
    memory = {item.kind: item.gib * GIB for item in result.memory}
    assert result.trainable_parameters is not None
    assert result.base_parameters is not None
    assert memory["gradients"] == pytest.approx(gradients * result.trainable_parameters)
    assert memory["optimizer states"] == pytest.approx(states * result.trainable_parameters)
    assert memory["base weights"] == pytest.approx(result.base_parameters * (0.5 if stage == 3 else 2.0))
    assert ("weights gathered by ZeRO-3" in memory) == (stage == 3)


def test_stage_0_in_fp32_has_no_second_master_copy() -> None:
    assert optimizer_bytes(10, 0, 4, 2) == 80
    assert optimizer_bytes(10, 0, 2, 2) == 120
    assert optimizer_bytes(10, 1, 4, 2) == 60


def test_offload_moves_to_the_host_and_loses_nothing() -> None:
    model = meta_model(_small_llama())
    recipe = _recipe()
    plain, states, weights = (
        estimate(
            recipe,
            model,
            _linears(model),
            zero_stage=3,
            offload=offload,
            train_rows=None,
            offload_weights=offload_weights,
        )
        for offload, offload_weights in ((False, False), (True, False), (True, True))
    )
    assert plain.host_gib == 0
    on_host = [{item.kind for item in result.memory if item.on_host} for result in (states, weights)]
    assert on_host[0] == {"gradients", "optimizer states"}
    assert on_host[1] == on_host[0] | {"base weights", "adapter", "frozen truncation factors"}
    for result in (states, weights):
        assert result.device_gib is not None
        assert result.host_gib is not None
        assert result.device_gib + result.host_gib == pytest.approx(plain.device_gib)


def _kept_bytes(model: nn.Module, tokens: torch.Tensor) -> int:
    """What autograd keeps of one forward pass up to the last hidden state, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # Holding the tensor keeps its address from being used again.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=tokens, use_cache=False)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("suffixes", [ALL, ("q_proj", "v_proj")])
def test_activations_match_what_autograd_keeps(
    suffixes: tuple[str, ...], dtype: torch.dtype, dropout: float, zero_stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if zero_stage == 3:
        monkeypatch.setattr(functional, "linear", zero3_linear_wrap)
    config = _small_llama(kv_heads=4)
    model = LlamaForCausalLM(config).requires_grad_(False).train()
    adapted = _adapt(model, suffixes, dropout)
    model.to(dtype)
    tokens = torch.randint(0, 128, (2, 64))
    shape = block_shape(config)
    assert shape is not None
    guess = activation_bytes(
        shape,
        adapted,
        tokens.numel(),
        element_bytes=dtype.itemsize,
        rank=RANK,
        mask_bytes=dtype.itemsize if dropout else 0,
        checkpointing=False,
        zero_stage=zero_stage,
    )
    assert guess == pytest.approx(_kept_bytes(model, tokens), rel=0.03)


def test_checkpointing_keeps_the_inputs_and_one_block() -> None:
    shape = BlockShape(layers=10, hidden=100, intermediate=300, query=100, vocabulary=50)
    full, some = (
        activation_bytes(shape, [], 7, element_bytes=2, rank=8, mask_bytes=0, checkpointing=checkpointing, zero_stage=2)
        for checkpointing in (False, True)
    )
    assert full == 10 * 7 * (800 + 2 * (400 + 900))
    assert some == 10 * 7 * 200 + full // 10


def test_the_recipe_decides_which_activations_are_counted() -> None:
    model = meta_model(_small_llama())
    results = [
        estimate(
            _recipe(train={"gradient_checkpointing": flag}), model, [], zero_stage=2, offload=False, train_rows=None
        )
        for flag in (False, True)
    ]
    counted = [next(item.gib for item in result.memory if item.kind == "activations") for result in results]
    assert counted == [results[0].activations_gib, results[0].activations_checkpointed_gib]
    assert counted[0] > counted[1]


def test_logits_are_kept_in_fp32_beside_their_own_type() -> None:
    assert logits_bytes(1000, 3, 2) == 3 * 1000 * 14
    assert logits_bytes(1000, 3, 4) == 3 * 1000 * 12


def test_gathered_weights_are_two_of_the_largest() -> None:
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64
    assert gathered_bytes(meta_model(_small_llama()), 2) == 2 * 2 * layer
    wide = _small_llama()
    wide.vocab_size = 10_000
    assert gathered_bytes(meta_model(wide), 2) == 2 * 2 * 10_000 * 64


def test_block_shape_of_other_architectures() -> None:
    assert block_shape(GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=99)) == BlockShape(3, 64, 256, 64, 99)
    assert block_shape(None) is None


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [
        ({}, 1280, 80),
        ({}, 1281, 81),
        ({"epochs": 3}, 10, 2),
        ({"epochs": 0.1}, 1280, 8),
        ({"epochs": 3, "max_steps": 5}, 1280, 5),
        ({"epochs": 3, "max_steps": 500}, 1280, 240),
    ],
)
def test_optimizer_steps(settings: dict[str, Any], rows: int, steps: int) -> None:
    assert optimizer_steps(TrainSettings(**settings), rows) == steps


def test_the_recipes_row_limit_holds() -> None:
    recipe = _recipe(data={"train_rows": 32})
    assert estimate(recipe, None, [], zero_stage=2, offload=False, train_rows=1000).optimizer_steps == 2
    assert estimate(recipe, None, [], zero_stage=2, offload=False, train_rows=16).optimizer_steps == 1


def test_unknown_model_is_said_not_guessed() -> None:
    result = estimate(_recipe(base={"model": "owner/secret"}), None, [], zero_stage=2, offload=False, train_rows=None)
    unknown = (result.base_parameters, result.trainable_parameters, result.trainable_share, result.device_gib)
    assert unknown == (None, None, None, None)
    assert (result.optimizer_steps, result.checkpoint_gib, result.memory) == (None, None, ())
    assert any("owner/secret" in line for line in result.unknown)
    assert len(result.unknown) == 2


def test_truncation_none_has_no_frozen_factors() -> None:
    model = meta_model(_small_llama())
    result: Estimate = estimate(
        _recipe(adapter={"truncation": "none"}), model, _linears(model), zero_stage=2, offload=False, train_rows=10
    )
    assert result.frozen_factor_parameters == 0
    assert result.unknown == ()
    assert result.device_gib is not None
    assert math.isfinite(result.device_gib)
