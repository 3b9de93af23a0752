"""How fast training and evaluation go: a training step beside PEFT's, packed samples beside padded ones, two workers beside one.

What is compared takes turns in one process, so that a change in the machine's speed meets all alike.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.core import Measurement, Setting, check
from benchmarks.inputs import SEQUENCE_TOKENS, SMOLLM2_LAYERS, base_of, review_rows, text_sets, token_rows
from benchmarks.timing import seconds_of, take_turns, times_as_fast
from kasa import KasaConfig, ModelWeights, attach, compute_spectra, find_targets, fold, penalty
from pipeline.cluster.connection import ray_cluster
from pipeline.cluster.workers import Resources, run_tasks
from pipeline.config.settings import EvaluateSettings
from pipeline.evaluation.worker import EvaluationShard, evaluate_shard
from pipeline.models.forward import Batch, collate, label_losses, pack
from pipeline.models.loading import load_base
from pipeline.models.prompting import load_tokenizer
from pipeline.training.job import BatchPlan
from tests.support.evaluations import prepare_rows, results_of, shards_of

RANK, ALPHA = 16, 32
SINGULAR_VALUE_WEIGHT, ORTHOGONALITY_WEIGHT = 1e-4, 1e-3
LEARNING_RATE = 2e-4
BATCH, STEPS, REGULARISER_TURNS = 4, 10, 40
# How far two fp32 computations of the same regularisers may lie apart.
SAME_PENALTY = 1e-5
# A sample's mean loss packed and alone, in nats.
SAME_LOSS = 1e-5
PACKED_SAMPLES, PACKED_BATCH, MICRO_BATCH, PACK_TOKENS, PACKING_TURNS = 192, 32, 8, 512, 3
SCALING_SAMPLES = 1000

Sample = dict[str, list[int]]


@dataclass(frozen=True)
class Arm:
    """A model in training: what its loss has beside the task's, and the optimizer of its adapter."""

    model: nn.Module
    regulariser: Callable[[], Any]
    optimizer: torch.optim.Optimizer


@check(bar=0.97, direction="at least", unit="times the tokens per second of PEFT's LoRA")
def train_step(setting: Setting) -> Measurement:
    """A training step with regularisers, all linear layers of SmolLM2-135M, r=16, against PEFT's LoRA and KaSA."""
    base = base_of(setting.workspace).folder
    rows = token_rows(text_sets(setting.workspace)["python reference"][0], load_tokenizer(base), 8192)
    batches = torch.tensor(rows).split(BATCH)
    arms = {
        "PEFT LoRA": _peft_arm(base, with_kasa=False),
        "PEFT KaSA": _peft_arm(base, with_kasa=True),
        "KaSA": _our_arm(base, folded=False),
        "KaSA, folded": _our_arm(base, folded=True),
    }
    losses: dict[str, float] = {}

    def step(name: str, turn: int) -> None:
        arm, tokens = arms[name], batches[turn % len(batches)]
        loss = arm.model(input_ids=tokens, labels=tokens, use_cache=False).loss + arm.regulariser()
        loss.backward()
        arm.optimizer.step()
        arm.optimizer.zero_grad()
        losses[name] = loss.item()

    seconds = take_turns({name: partial(step, name) for name in arms}, STEPS)
    against_kasa = times_as_fast(seconds, "KaSA", "PEFT KaSA")
    flaws = [f"{against_kasa:.3f} times as fast as PEFT's KaSA"] if against_kasa <= 1 else []
    flaws += [flaw for name, arm in arms.items() for flaw in _other_count(name, _adapted_count(arm.model))]
    tokens = BATCH * SEQUENCE_TOKENS
    details = {
        "rank": RANK,
        "tokens_per_step": tokens,
        "threads": torch.get_num_threads(),
        "tokens_per_second": {name: tokens / statistics.median(seconds[name]) for name in seconds},
        "against_peft_lora": {name: times_as_fast(seconds, name, "PEFT LoRA") for name in seconds},
        "against_peft_kasa": {name: times_as_fast(seconds, name, "PEFT KaSA") for name in seconds},
        "seconds": {name: [round(took, 4) for took in seconds[name]] for name in seconds},
        "last_loss": losses,
    }
    return Measurement(times_as_fast(seconds, "KaSA", "PEFT LoRA"), details, flaws=tuple(flaws))


@check(bar=5, direction="at least", unit="times as fast")
def regulariser(setting: Setting) -> Measurement:
    """Both regularisers of SmolLM2's 210 layers at r=16, forward and backward, against PEFT's `_get_kasa_loss`."""
    base = base_of(setting.workspace).folder
    theirs, ours = _peft_arm(base, with_kasa=True).model, load_base(base, "fp32")
    config = _config(truncation="none")
    layers = attach(ours, find_targets(ours, "all-linear"), config)
    with torch.no_grad():
        for name, layer in layers.items():
            module: Any = theirs.get_submodule(f"base_model.model.{name}")
            update = layer.update
            assert update is not None
            update.b.normal_()
            module.lora_A["default"].weight.copy_(update.a)
            module.lora_diag["default"].copy_(update.d)
            module.lora_B["default"].weight.copy_(update.b)
    values: dict[str, float] = {}

    def once(name: str, model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
        model.zero_grad()
        value = loss()
        value.backward()
        values[name] = value.item()

    seconds = take_turns(
        {
            "PEFT": lambda _: once("PEFT", theirs, theirs._get_kasa_loss),  # type: ignore[arg-type]
            "KaSA": lambda _: once("KaSA", ours, lambda: penalty(layers.values(), "paper").weighted(config)),
        },
        REGULARISER_TURNS,
    )
    apart = abs(values["KaSA"] - values["PEFT"]) / abs(values["PEFT"])
    flaws = [f"the values lie {apart:.1e} apart"] if apart > SAME_PENALTY else []
    details = {
        "rank": RANK,
        "layers": len(layers),
        "threads": torch.get_num_threads(),
        "milliseconds": {name: 1000 * statistics.median(seconds[name]) for name in seconds},
        "values_apart": apart,
    }
    return Measurement(
        times_as_fast(seconds, "KaSA", "PEFT"), details, flaws=(*flaws, *_other_count("KaSA", len(layers)))
    )


@check(bar=2, direction="at least", unit="times as fast")
def packing(setting: Setting) -> Measurement:
    """Tokens per second of packed movie reviews, all tokens labelled, against padded ones in random order (training pass)."""
    base = base_of(setting.workspace).folder
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(base)
    texts = [tokenizer(row["prompt"])["input_ids"] for row in review_rows(setting.workspace)]
    chosen = random.Random(0).sample([ids for ids in texts if len(ids) > 1], PACKED_SAMPLES)
    samples = [{"input_ids": ids, "labels": ids} for ids in chosen]
    model = load_base(base, "fp32")
    attach(model, find_targets(model, "all-linear"), KasaConfig(rank=16, truncation="none", dropped_rank=0))

    def training_pass(batches: Sequence[Batch], _turn: int) -> None:
        for batch in batches:
            label_losses(model, batch).sum().backward()
        model.zero_grad()

    ways = {name: partial(training_pass, batches) for name, batches in _ways(samples).items()}
    seconds = take_turns(ways, PACKING_TURNS)
    gains = {name: times_as_fast(seconds, "packed", name) for name in ways if name != "packed"}
    worst = _worst_difference(model, samples)
    tokens = sum(len(ids) for ids in chosen)
    details = {
        "tokens_per_second": {name: tokens / statistics.median(times) for name, times in seconds.items()},
        "packed_against": gains,
        "tokens_per_sample": {"mean": tokens / len(chosen), "longest": max(map(len, chosen))},
        "largest_loss_difference": worst,
    }
    flaws = () if worst <= SAME_LOSS else (f"a sample's mean loss differs by {worst:.1e}",)
    return Measurement(gains["padded, random order"], details, flaws=flaws)


@check(bar=1.6, direction="at least", unit="times")
def eval_scaling(setting: Setting) -> Measurement:
    """Speed of evaluating 1,000 reviews by 2 workers of one thread each, over 1 worker; loading the model is included."""
    base = base_of(setting.workspace).folder
    rows: list[dict[str, Any]] = [*review_rows(setting.workspace)[:SCALING_SAMPLES]]
    prepared = prepare_rows(base, rows, setting.scratch / "scaling", prompt_template="Review: {prompt}\nSentiment: ")
    settings = EvaluateSettings(kind="choice", choices=["positive", "negative"], samples_shown=0)
    seconds, results = {}, {}
    with ray_cluster(setting.workspace, 2, 0):
        for count in (1, 2):
            shards = shards_of(base, prepared, settings, count, setting.scratch / f"scaling-{count}")
            seconds[count] = max(run_tasks(_seconds_of_shard, shards, Resources(1)))
            results[count] = results_of(shards)
    differing = [one["sample"] for one, other in zip(results[1], results[2], strict=False) if one != other]
    flaws = () if results[1] == results[2] else (f"{len(differing)} results differ (samples {differing[:5]})",)
    details = {
        "samples": len(results[1]),
        "seconds": {"1 worker": seconds[1], "2 workers": seconds[2]},
        "seconds_are": "of the slowest worker, from loading the model to the last result; the start of its process is not",
    }
    return Measurement(seconds[1] / seconds[2], details, flaws=flaws)


def _seconds_of_shard(shard: EvaluationShard) -> float:
    """Seconds that a shard takes in its worker."""
    seconds, _ = seconds_of(evaluate_shard, shard)
    return seconds


def _our_arm(base: Path, folded: bool) -> Arm:
    model, config = load_base(base, "fp32"), _config(truncation="weight")
    targets = find_targets(model, "all-linear")
    layers = attach(model, targets, config, compute_spectra(ModelWeights(model), targets, RANK))
    if folded:
        fold(model)
    return _arm(model, lambda: penalty(layers.values(), config.regulariser).weighted(config))


def _peft_arm(base: Path, with_kasa: bool) -> Arm:
    from peft import KasaConfig as PeftKasaConfig
    from peft import LoraConfig, get_peft_model

    weights = PeftKasaConfig(beta=SINGULAR_VALUE_WEIGHT, gamma=ORTHOGONALITY_WEIGHT) if with_kasa else None
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", kasa_config=weights)
    model: Any = get_peft_model(load_base(base, "fp32"), config)
    return _arm(model, model._get_kasa_loss)


def _arm(model: nn.Module, regulariser: Callable[[], Any]) -> Arm:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Arm(model.train(), regulariser, torch.optim.AdamW(trained, lr=LEARNING_RATE))


def _adapted_count(model: nn.Module) -> int:
    """How many layers have a trained B."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return sum(name.endswith((".b", ".lora_B.default.weight")) for name in names)


def _other_count(name: str, layers: int) -> list[str]:
    return [] if layers == SMOLLM2_LAYERS else [f"{name} adapts {layers} layers, not {SMOLLM2_LAYERS}"]


def _config(truncation: Any) -> KasaConfig:
    return KasaConfig(
        rank=RANK,
        alpha=float(ALPHA),
        truncation=truncation,
        dropped_rank=RANK,
        singular_value_weight=SINGULAR_VALUE_WEIGHT,
        orthogonality_weight=ORTHOGONALITY_WEIGHT,
    )


def _ways(samples: Sequence[Sample]) -> dict[str, list[Batch]]:
    """The same samples in the same steps, shared out over forward passes in each way."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    steps = len(samples) // PACKED_BATCH

    def batches(make: Callable[..., Batch], pack_tokens: int | None) -> list[Batch]:
        plan = BatchPlan(lengths, lengths, steps, PACKED_BATCH, MICRO_BATCH, 1, 0, pack_tokens)
        passes = [chosen for step in range(steps) for chosen in plan.micro_batches(step, rank=0)]
        return [make([samples[index] for index in chosen]) for chosen in passes]

    random_order = [samples[start : start + MICRO_BATCH] for start in range(0, len(samples), MICRO_BATCH)]
    return {
        "padded, random order": [collate(chosen) for chosen in random_order],
        "padded, like lengths together": batches(collate, None),
        "packed": batches(pack, PACK_TOKENS),
    }


@torch.no_grad()
def _worst_difference(model: nn.Module, samples: Sequence[Any]) -> float:
    """The largest difference of a sample's mean loss between packed and alone, in nats."""
    worst = 0.0
    for start in range(0, len(samples), MICRO_BATCH):
        chosen = samples[start : start + MICRO_BATCH]
        packed = label_losses(model, pack(chosen))[0].split([len(sample["labels"]) - 1 for sample in chosen])
        for sample, losses in zip(chosen, packed, strict=True):
            alone = label_losses(model, collate([sample]))
            worst = max(worst, abs(float(losses.mean() - alone.mean())))
    return worst
