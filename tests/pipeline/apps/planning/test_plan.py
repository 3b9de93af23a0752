"""Estimates against real models and adapters, what autograd really keeps, and torch's own count of FLOPs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from kasa import KasaConfig, attach, detach, find_targets, observe_layers, save_adapter
from kasa.adapter import frozen_factors
from kasa.adapter import trainable_parameters as trainable_tensors
from kasa.adapter_file import SavedAdapter
from kasa.errors import TargetError
from kasa.layer import KasaUpdate
from kasa.spectra import Triplets
from kasa.targets import Target
from pipeline.apps import plan as plan_module
from pipeline.apps.plan import DataFacts, Estimate, checked_targets, estimate, plan_training
from pipeline.apps.plan_compute import Hardware, hardware_of, spectra_cost, training_flops
from pipeline.apps.plan_memory import (
    GIB,
    PROCESS_GIB,
    AdaptedModule,
    BlockShape,
    ForwardPass,
    Partitioning,
    activation_bytes,
    base_parameters,
    block_shape,
    frozen_factor_parameters,
    gathered_bytes,
    logits_bytes,
    optimizer_bytes,
    trainable_parameters,
)
from pipeline.config.recipe import Recipe, parse_recipe
from pipeline.config.settings import TrainSettings
from pipeline.core.errors import BaseModelError, RecipeError
from pipeline.models import shapes as model_shapes
from pipeline.models.shapes import meta_model, model_config
from pipeline.training.job import optimizer_steps
from pipeline.training.zero import Checkpoint, save_checkpoint

LLAMAS = ("Llama-2-7b-hf", "Llama-2-13b-hf", "Llama-2-70b-hf", "Meta-Llama-3-8B", "Meta-Llama-3-70B")
RANK, DROPPED = 4, 2
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def _empty_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_shapes, "_cached_folder", lambda *_: None)


def _recipe(**sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {"name": "t", "data": {"train": "x.jsonl"}, "train": {"precision": "bf16"}}
    values["adapter"] = {"truncation": "loss"}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return parse_recipe(values, "test")


def _small_llama(kv_heads: int = 2) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=128,
    )


def _adapted(targets: list[Target], rank: int = RANK, dropped: int = DROPPED) -> list[AdaptedModule]:
    return [AdaptedModule(target, rank, dropped) for target in targets]


def _adapt(model: nn.Module, targets: list[Target], dropout: float = 0.0, dropped: int = DROPPED) -> KasaConfig:
    """The method library's own adapter, with factors of any values."""
    spectra = {
        t.name: Triplets(
            torch.randn(t.out_features, DROPPED),
            torch.ones(DROPPED),
            torch.randn(DROPPED, t.in_features),
            1,
            0,
            0,
            "svd",
        )
        for t in targets
    }
    rule = "weight" if dropped else "none"
    config = KasaConfig(rank=RANK, dropout=dropout, truncation=rule, dropped_rank=dropped)  # type: ignore[arg-type]
    attach(model, targets, config, spectra)
    return config


@pytest.mark.parametrize("name", LLAMAS)
def test_trainable_parameters_are_those_of_the_attached_adapter(name: str) -> None:
    config = model_config(name)
    assert config is not None
    model = meta_model(config)
    targets = find_targets(model, "all-linear")
    layers = config.num_hidden_layers
    assert len(targets) == 7 * layers
    attach(model, targets, KasaConfig(rank=1, truncation="none"))
    counted = sum(tensor.numel() for tensor in trainable_tensors(model).values())
    assert trainable_parameters(_adapted(targets, rank=1)) == counted
    detach(model)


def test_frozen_factors_are_those_of_the_attached_adapter() -> None:
    model = LlamaForCausalLM(_small_llama())
    targets = find_targets(model, "all-linear")
    _adapt(model, targets)
    assert frozen_factor_parameters(_adapted(targets)) == sum(f.numel() for f in frozen_factors(model).values())


def _tensor_bytes(file: Path) -> int:
    """Of a safetensors file, without its header."""
    content = file.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def test_disk_is_that_of_a_real_checkpoint_and_adapter(tmp_path: Path) -> None:
    model = LlamaForCausalLM(_small_llama())
    targets = find_targets(model, "all-linear")
    config = _adapt(model, targets)
    values = {name: tensor.detach() for name, tensor in trainable_tensors(model).items()}
    moments = {f"{moment}/{name}": t.clone() for moment in ("exp_avg", "exp_avg_sq") for name, t in values.items()}
    save_checkpoint(tmp_path, Checkpoint(1, values, moments), kept=1)
    digests = dict.fromkeys((target.name for target in targets), "0")
    save_adapter(tmp_path / "a", SavedAdapter(config, tuple(targets), "b", digests, values, frozen_factors(model)))
    recipe = _recipe(adapter={"rank": RANK, "truncation_rank": DROPPED})
    result = estimate(recipe, meta_model(_small_llama()), targets)
    assert result.checkpoint_gib is not None
    assert result.adapter_gib is not None
    checkpoint = tmp_path / "step-0000001" / "tensors.safetensors"
    assert result.checkpoint_gib * GIB == pytest.approx(_tensor_bytes(checkpoint))
    assert result.adapter_gib * GIB == pytest.approx(_tensor_bytes(tmp_path / "a" / "tensors.safetensors"))


def test_llama_2_7b_with_the_papers_targets() -> None:
    """r = 32 on q, k, v, up, down: 3 (4096 + 4096) + 2 (4096 + 11008) = 54784 features and 5 diagonals per layer."""
    recipe = _recipe(
        base={"model": "meta-llama/Llama-2-7b-hf"},
        data={"train_rows": 170_420},
        adapter={"rank": 32, "alpha": 64, "targets": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]},
        train={"workers": 4, "batch_size": 16, "micro_batch_size": 2, "gpu": True, "deepspeed": "gpu_zero3"},
    )
    result = plan_training(recipe, Hardware())
    assert result.base_parameters == 6_738_415_616
    assert result.trainable_parameters == 32 * (32 * 54784 + 32 * 5) == 56_103_936
    assert result.frozen_factor_parameters == 32 * 32 * 54784
    assert result.trainable_share == pytest.approx(0.008326, rel=1e-3)
    assert result.adapted_modules == 160
    assert result.memory is not None
    memory = {item.kind: item.gib for item in result.memory.items}
    assert memory["base weights"] == pytest.approx(6_738_415_616 * 2 / 4 / GIB)
    assert memory["optimizer states"] == pytest.approx(56_103_936 * 12 / 4 / GIB)
    assert memory["gradients"] == pytest.approx(56_103_936 * 2 / 4 / GIB)
    assert memory["adapter"] == pytest.approx(56_103_936 * 2 * 1.25 / GIB)
    assert memory["DeepSpeed buckets"] == pytest.approx(50_000_000 * 2 / GIB)
    assert memory["gathered weights"] == pytest.approx((10**9 + 32000 * 4096) * 2 / GIB)
    assert result.optimizer_steps == 10_652
    assert result.gradient_accumulation == 2


def _memory(stage: str) -> dict[str, float]:
    """Bytes by kind under a configuration, with 4 workers in bf16."""
    model = meta_model(_small_llama())
    result = estimate(_recipe(train={"workers": 4, "micro_batch_size": 1}), model, find_targets(model, "all-linear"))
    (memory,) = (memory for memory in result.stages if memory.deepspeed == stage)
    return {item.kind: item.gib * GIB for item in memory.items}


@pytest.mark.parametrize(("stage", "gradients", "states"), [("cpu_zero1", 2.0, 3.0), ("cpu_zero2", 0.5, 3.0)])
def test_zero_stages_divide_what_they_partition(stage: str, gradients: float, states: float) -> None:
    model = meta_model(_small_llama())
    trainable = trainable_parameters(_adapted(find_targets(model, "all-linear"), rank=8))
    base = sum(parameter.numel() for parameter in model.parameters())
    memory, third = _memory(stage), _memory("cpu_zero3")
    assert memory["gradients"] == pytest.approx(gradients * trainable)
    assert memory["optimizer states"] == third["optimizer states"] == pytest.approx(states * trainable)
    assert memory["base weights"] == pytest.approx(2 * base)
    assert third["base weights"] == pytest.approx(2 * base / 4)
    assert "gathered weights" not in memory
    assert third["gathered weights"] == pytest.approx(2 * base)
    # On a CPU a bucket is never larger than what is written to it.
    assert memory["DeepSpeed buckets"] == pytest.approx(2 * trainable)


def test_optimizer_states() -> None:
    assert [optimizer_bytes(10, Partitioning(stage, 2)) for stage in (0, 1, 2, 3)] == [80, 60, 60, 60]


def test_offload_moves_to_the_host_and_loses_nothing() -> None:
    model = meta_model(_small_llama())
    recipe = _recipe(train={"gpu": True, "deepspeed": "gpu_zero3", "workers": 2})
    result = estimate(recipe, model, find_targets(model, "all-linear"))
    plain, offloaded = (m for m in result.stages if m.zero_stage == 3)
    assert offloaded.deepspeed == "gpu_zero3_offload"
    assert {item.kind for item in plain.items if item.on_host} == {"factors kept for saving"}
    assert {item.kind for item in offloaded.items if item.on_host} == {
        "factors kept for saving",
        "base weights",
        "dropped factors",
        "gradients",
        "optimizer states",
    }
    assert offloaded.device_gib + offloaded.host_gib == pytest.approx(plain.device_gib + plain.host_gib)
    assert [m.deepspeed for m in result.stages] == [
        "cpu_zero0",
        "gpu_zero1",
        "gpu_zero2",
        "gpu_zero3",
        "gpu_zero3_offload",
    ]


def test_buckets_are_what_the_configuration_says() -> None:
    zero = {"stage": 2, "reduce_bucket_size": 100, "overlap_comm": True}
    assert Partitioning.from_config({"zero_optimization": zero}, 2).bucket == 200
    assert Partitioning.from_config({"zero_optimization": zero | {"stage": 3}}, 2).bucket == 100
    assert Partitioning.from_config({"zero_optimization": {"stage": 2}}, 2).bucket == 500_000_000
    assert Partitioning.from_config({}, 2).bucket == 0


def test_gathered_weights_end_where_the_configuration_says() -> None:
    model = meta_model(_small_llama())
    base, largest = sum(p.numel() for p in model.parameters()), 160 * 64
    assert gathered_bytes(model, 2, Partitioning(3, 2, max_live=1000)) == 2 * (1000 + largest)
    assert gathered_bytes(model, 2, Partitioning(3, 2)) == 2 * base
    assert gathered_bytes(model, 2, Partitioning(3, 1)) == gathered_bytes(model, 2, Partitioning(2, 2)) == 0
    assert gathered_bytes(model, 2, Partitioning(3, 1, offload_weights=True)) == 2 * base


def _kept_bytes(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
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
        model.model(**inputs, use_cache=False)  # type: ignore[operator]
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [ALL, ("q_proj", "v_proj")])
@pytest.mark.parametrize("rows", [1, 2])
def test_activations_match_what_autograd_keeps(
    rows: int,
    names: tuple[str, ...],
    dtype: torch.dtype,
    dropout: float,
    zero_stage: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    if zero_stage == 3:
        monkeypatch.setattr(functional, "linear", zero3_linear_wrap)
    config = _small_llama()
    model = LlamaForCausalLM(config).train()
    targets = find_targets(model, list(names))
    _adapt(model, targets, dropout)
    model.to(dtype)
    tokens = torch.randint(0, 128, (rows, 128))
    mask = torch.ones_like(tokens)
    mask[1:, :9] = 0
    shape = block_shape(config)
    assert shape is not None
    mask_bytes = dtype.itemsize if dropout else 0
    forward = ForwardPass(rows, 128, dtype.itemsize, rows > 1, mask_bytes)
    guess = activation_bytes(shape, _adapted(targets), forward, zero_stage)
    assert guess == pytest.approx(_kept_bytes(model, {"input_ids": tokens, "attention_mask": mask}), rel=0.05)


def test_checkpointing_keeps_the_inputs_and_what_a_block_takes_beyond_the_logits() -> None:
    shape = BlockShape(layers=10, hidden=100, intermediate=300, query=100, key_value=100, vocabulary=50)
    full, some = (activation_bytes(shape, [], ForwardPass(1, 7, 2, False, 0, flag), 2) for flag in (False, True))
    assert full == 10 * 7 * (800 + 2 * (400 + 900))
    assert some == 10 * 7 * 200 + full // 10 - logits_bytes(50, 7)
    wide = BlockShape(layers=10, hidden=100, intermediate=300, query=100, key_value=100, vocabulary=5000)
    assert activation_bytes(wide, [], ForwardPass(1, 7, 2, False, 0, True), 2) == 10 * 7 * 200


def test_the_recipe_decides_which_activations_are_counted() -> None:
    model = meta_model(_small_llama())
    results = [estimate(_recipe(train={"gradient_checkpointing": flag}), model, []) for flag in (False, True)]
    counted = [
        next(item.gib for item in result.memory.items if item.kind == "activations")
        for result in results
        if result.memory is not None
    ]
    assert counted == [results[0].activations_gib, results[0].activations_checkpointed_gib]
    assert counted[0] > counted[1]


def test_block_shape_of_other_architectures() -> None:
    gpt2 = GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=99)
    assert block_shape(gpt2) == BlockShape(3, 64, 256, 64, 64, 99)
    assert block_shape(_small_llama()) == BlockShape(4, 64, 160, 64, 32, 128)
    assert block_shape(None) is None


def test_flops_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the gradients of the first block's inputs, which nobody needs. Torch counts neither fused attention nor
    products that are added in place."""
    monkeypatch.setattr(KasaUpdate, "fits", lambda *_: False)
    config = _small_llama()
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    targets = find_targets(model, "all-linear")
    _adapt(model, targets)
    tokens = torch.randint(0, 128, (1, 32))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    shape = block_shape(_small_llama())
    assert shape is not None
    guess = 32 * training_flops(model, shape, _adapted(targets), 32, checkpointing=False)
    assert guess == pytest.approx(counter.get_total_flops(), rel=0.04)
    recomputing = 32 * training_flops(model, shape, _adapted(targets), 32, checkpointing=True)
    assert 1.3 < recomputing / guess < 1.5


def test_spectra_hold_the_covariances_that_calibration_makes() -> None:
    model = LlamaForCausalLM(_small_llama())
    targets = find_targets(model, "all-linear")
    with observe_layers(model, targets, gradients=True) as sums:
        model(input_ids=torch.randint(0, 128, (1, 8))).logits.sum().backward()
    inputs, gradients = (sum(m.nbytes for m in part.values()) for part in (sums.inputs_II, sums.gradients_OO))
    cost = spectra_cost(targets, 8, "loss")
    assert cost.calibration_gib * GIB == inputs + gradients
    assert spectra_cost(targets, 8, "activation").calibration_gib * GIB == inputs
    assert cost.weights == 28
    plain = spectra_cost(targets, 8, "weight")
    assert plain.calibration_gib == 0
    assert plain.flops < cost.flops
    assert plain.task_gib * GIB == 8 * 160 * 64 + 16 * 64 * 64
    assert spectra_cost([Target("w", 200, 100)], 1, "weight").flops == pytest.approx(
        2 * 100**2 * 200 + 4 / 3 * 100**3 + 2 * 100 * 700
    )


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


def test_what_is_known_of_the_data_replaces_the_recipes_limits() -> None:
    recipe = _recipe(data={"train_rows": 32, "max_tokens": 512})
    model = meta_model(_small_llama())
    unknown = estimate(recipe, model, [])
    assert (unknown.row_tokens, unknown.mean_row_tokens, unknown.optimizer_steps) == (512, 512, 2)
    many = estimate(recipe, model, [], data=DataFacts(1000, 20.5, 64))
    assert (many.row_tokens, many.mean_row_tokens, many.optimizer_steps) == (64, 20.5, 2)
    assert estimate(recipe, model, [], data=DataFacts(16, 20.5, 64)).optimizer_steps == 1
    assert many.step_flops is not None
    assert unknown.step_flops is not None
    assert many.step_flops < unknown.step_flops * 20.5 / 512


@pytest.mark.parametrize(
    ("data", "train", "rows", "steps"),
    [
        ({}, {}, 90, 6),  # a tenth is held out
        ({"heldout": "other.jsonl"}, {}, 100, 7),
        ({"validation_rows": 10}, {"max_steps": 3}, 80, 3),
        ({"train_rows": 20}, {}, 20, 2),
        ({"train": ["rows.jsonl", "more.csv", "more.parquet", "more.json"], "heldout": "x.jsonl"}, {}, 106, 7),
        ({"train": ["rows.jsonl", "absent.jsonl"]}, {"max_steps": 3}, None, 3),
        ({"train": "damaged.parquet"}, {}, None, None),
        ({"train": "https://localhost/rows.jsonl"}, {}, None, None),
    ],
)
def test_rows_of_local_files_are_counted(data, train, rows, steps, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n\n' * 100)
    Path("more.csv").write_text('text\na\n"b\nc"\n')
    Path("more.json").write_text('[{"text": "a"},\n{"text": "b"}]')
    Path("damaged.parquet").write_text("PAR1")
    pq.write_table(pa.table({"text": ["a", "b"]}), "more.parquet")
    result = estimate(_recipe(data={"train": "rows.jsonl", **data}, train=train), meta_model(_small_llama()), [])
    assert (result.train_rows, result.optimizer_steps) == (rows, steps)
    assert any("optimizer steps" in line for line in result.unknown) == (rows is None)


def test_more_memory_than_there_is_is_said(monkeypatch) -> None:
    monkeypatch.setattr(plan_module, "memory_gib", lambda: (4.0, 2.0))
    model, targets = meta_model(_small_llama()), find_targets(meta_model(_small_llama()), "all-linear")
    for workers, said in ((1, False), (16, True)):
        warnings = estimate(_recipe(train={"workers": workers}), model, targets).warnings
        assert bool(warnings) is said
        assert all(
            re.match(r"memory: 16 workers need \d+\.\d GiB and this machine has 4\.0", line) for line in warnings
        )
    assert estimate(_recipe(train={"workers": 16, "gpu": True}), model, targets).warnings == ()


def test_packed_samples_fill_one_row() -> None:
    model = meta_model(_small_llama())
    packed = _recipe(data={"max_tokens": 64}, train={"pack_tokens": 256, "micro_batch_size": 3})
    result = estimate(packed, model, [])
    padded = estimate(_recipe(data={"max_tokens": 256}, train={"micro_batch_size": 1}), model, [])
    assert (result.gradient_accumulation, result.pack_tokens) == (None, 256)
    assert result.activations_gib is not None
    assert padded.activations_gib is not None
    # One row of as many tokens, but with a mask that keeps samples apart, and k and v for every head.
    assert (result.activations_gib - padded.activations_gib) * GIB == 4 * 256 * 2 * (256 + 2 * 32)


def test_zero_plus_plus_keeps_two_shares_in_8_bits() -> None:
    model, targets = meta_model(_small_llama()), find_targets(meta_model(_small_llama()), "all-linear")
    recipe = _recipe(train={"gpu": True, "deepspeed": "gpu_zero3", "workers": 16})
    plain, plus_plus = (
        m for m in estimate(recipe, model, targets).stages if m.deepspeed in ("gpu_zero3", "gpu_zero3_plusplus")
    )
    weights = [next(item.gib for item in memory.items if item.kind == "base weights") for memory in (plain, plus_plus)]
    assert weights[0] == pytest.approx(2 * base_parameters(model) / 16 / GIB)
    assert weights[1] == pytest.approx(base_parameters(model) * (1 / 16 + 1 / 8) / GIB)


def test_time_follows_from_peak_and_utilisation() -> None:
    recipe = _recipe(data={"train_rows": 32}, train={"workers": 2})
    result = estimate(recipe, meta_model(_small_llama()), [], hardware=Hardware(None, 1e-6, 0.5))
    assert result.step_flops is not None
    assert result.step_seconds == pytest.approx(result.step_flops / (2 * 1e6 * 0.5))
    assert result.training_seconds == pytest.approx(2 * result.step_flops / (2 * 1e6 * 0.5))


@pytest.mark.parametrize(("memory_gib", "recommended"), [(79, "gpu_zero1"), (14, "gpu_zero3"), (2, None), (None, None)])
def test_the_lowest_stage_that_fits_is_recommended(memory_gib: float | None, recommended: str | None) -> None:
    recipe = _recipe(
        base={"model": "Llama-2-7b-hf"},
        data={"max_tokens": 256},
        train={"gpu": True, "deepspeed": "gpu_zero2", "workers": 4, "micro_batch_size": 1, "gradient_checkpointing": True},
    )  # fmt: skip
    result = plan_training(recipe, Hardware(memory_gib))
    assert result.recommended == recommended
    refused = [stage.deepspeed for stage in result.stages if stage.refused]
    assert refused == ["cpu_zero0"]
    assert [stage.refused for stage in result.stages if stage.refused] == [
        "ZeRO stage 0 does not go with train.precision bf16"
    ]


def test_unknown_model_is_said_not_guessed() -> None:
    result = estimate(_recipe(base={"model": "owner/secret"}), None, [])
    unknown = (result.base_parameters, result.trainable_parameters, result.trainable_share, result.memory)
    assert unknown == (None, None, None, None)
    assert (result.optimizer_steps, result.checkpoint_gib, result.stages) == (None, None, ())
    assert any("owner/secret" in line for line in result.unknown)
    assert len(result.unknown) == 3
    with pytest.raises(BaseModelError, match=r"owner/secret.*llama-2-7b-hf"):
        plan_training(_recipe(base={"model": "owner/secret"}), Hardware())


def test_truncation_none_has_no_frozen_factors() -> None:
    model = meta_model(_small_llama())
    recipe = _recipe(adapter={"truncation": "none"}, data={"train_rows": 10})
    result: Estimate = estimate(recipe, model, find_targets(model, "all-linear"), hardware=Hardware(peak_tflops=1))
    assert result.frozen_factor_parameters == 0
    assert result.unknown == ()
    assert result.memory is not None
    assert math.isfinite(result.memory.device_gib)
    assert "dropped factors" not in {item.kind for item in result.memory.items}
    assert result.memory.items[0].gib == PROCESS_GIB["cpu"]


def _options(recipe: Recipe, **changes: Any) -> tuple[Recipe, Hardware]:
    options: dict[str, Any] = {
        "gpus": None, "nodes": 1, "gpu": None, "gpu_memory_gib": None, "peak_tflops": None, "utilisation": 0.4,
    }  # fmt: skip
    return hardware_of(recipe, **(options | changes))


def test_gpus_become_workers_and_a_known_gpu_brings_its_figures() -> None:
    recipe, hardware = _options(_recipe(train={"batch_size": 64}), gpus=4, nodes=2, gpu="h100")
    assert (recipe.train.workers, recipe.train.gpu, recipe.train.deepspeed) == (8, True, "gpu_zero2")
    assert hardware == Hardware(79, 989, 0.4)
    nobodys = parse_recipe({"name": "t", "data": {"train": "x.jsonl"}, "train": {"precision": "auto"}}, "test")
    assert _options(nobodys, gpus=8)[0].train.precision == "bf16"
    _, own = _options(recipe, gpu="H100", gpu_memory_gib=40, peak_tflops=500)
    assert own == Hardware(40, 500, 0.4)
    fp32 = _recipe(train={"precision": "fp32", "gpu": True})
    assert _options(fp32, gpu="H100")[1].peak_tflops is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 2}, "--nodes 2 needs --gpus"),
        ({"gpu": "H100"}, "trains without GPUs"),
        ({"gpu_memory_gib": 80}, "trains without GPUs"),
        ({"gpus": 1, "gpu": "H1000"}, r"'H1000' is not in the table \(A10, "),
        ({"gpus": 32}, r"--gpus 32 --nodes 1: recipe: train.batch_size 16 leaves some of the 32 workers idle"),
    ],
)
def test_options_that_contradict_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _options(_recipe(), **changes)


@pytest.fixture
def kasa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """`kasa("plan", ...)` in an empty folder with a recipe: exit code, last line on stdout, stderr."""
    from pipeline.cli import main as cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "{name: t, base: {model: Meta-Llama-3-8B}, data: {train: none.jsonl, train_rows: 1000}, train: {batch_size: 64}}"
    )

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kasa", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), (out.splitlines() or [""])[-1], out + err

    return run


def test_the_command_answers_with_one_json_object(kasa: Any) -> None:
    code, last, _ = kasa("plan", "recipe.yaml", "--gpus", "8", "--gpu", "H100", "--json")
    answer = json.loads(last)
    assert code == 0
    assert answer["base_parameters"] == 8_030_261_248
    assert answer["recommended"] == "gpu_zero1"
    assert answer["training_seconds"] == pytest.approx(16 * answer["step_seconds"])
    sums = [sum(i["gib"] for i in s["items"] if not i["on_host"]) for s in answer["stages"]]
    assert sums == pytest.approx([s["device_gib"] for s in answer["stages"]])


def test_the_command_answers_in_words(kasa: Any) -> None:
    code, _, text = kasa("plan", "recipe.yaml", "--gpus", "8", "--gpu", "H100")
    assert code == 0
    for part in ("8,030,261,248 in the base", "gpu_zero3_offload", "fits 79 GiB", "train.deepspeed=gpu_zero1 fits"):
        assert part in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("absent.yaml",),
        ("recipe.yaml", "base.model=owner/secret"),
        ("recipe.yaml", "base.modell=x"),
        ("recipe.yaml", "--gpu", "H1000", "--gpus", "1"),
        ("recipe.yaml", "--gpus", "70"),
        ("recipe.yaml", "adapter.targets=[q_prj]"),
        ("recipe.yaml", "train.deepspeed=gpu_zero4"),
        ("recipe.yaml", "train.precision=bf16", "train.deepspeed=cpu_zero0"),
    ],
)
def test_wrong_input_is_one_error_and_exit_code_2(kasa: Any, arguments: tuple[str, ...]) -> None:
    code, _, text = kasa("plan", *arguments)
    assert code == 2
    assert text.startswith("error: ")
    assert len(text.strip().splitlines()) == 1


def test_options_out_of_range_end_with_exit_code_2(kasa: Any) -> None:
    assert kasa("plan", "recipe.yaml", "--gpus", "0")[0] == 2
    assert kasa("plan", "recipe.yaml", "--utilisation", "1.5")[0] == 2


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"adapter": {"rank": 64}}, "adapter.rank 64"),
        ({"adapter": {"truncation_rank": 64}}, "adapter.truncation_rank 64"),
        ({"spectra": {"rank": 64}}, "spectra.rank 64"),
    ],
)
def test_a_rank_too_high_is_named_by_the_key_that_sets_it(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(TargetError, match=f"^{re.escape(key)} must be below"):
        checked_targets(_recipe(**sections), meta_model(_small_llama()))
