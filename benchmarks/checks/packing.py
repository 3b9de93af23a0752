"""Packed samples against padded ones: the same losses, in less time."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.core import CannotRunError, Measurement, Setting, check
from benchmarks.texts import review_rows
from kasa import KasaConfig, KasaError, attach, find_targets
from pipeline.config.settings import BaseSettings
from pipeline.models.base import find_base
from pipeline.models.language_model import Batch, collate, label_losses, pack
from pipeline.models.loading import load_base
from pipeline.models.prompting import load_tokenizer
from pipeline.training.batches import BatchPlan

SAMPLES = 192
BATCH = 32
MICRO_BATCH = 8
PACK_TOKENS = 512
REPEATS = 3
TOLERANCE = 1e-5

Sample = dict[str, list[int]]


@check(bar=2, direction="at least", unit="times as fast")
def packing(setting: Setting) -> Measurement:
    """Tokens per second of packed movie reviews, all tokens labelled, against padded ones in random order (training pass)."""
    try:
        base = find_base(BaseSettings(), setting.workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None
    assert base is not None
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(base.folder)
    texts = [tokenizer(row["prompt"])["input_ids"] for row in review_rows(setting.workspace)]
    chosen = random.Random(0).sample([ids for ids in texts if len(ids) > 1], SAMPLES)
    samples = [{"input_ids": ids, "labels": ids} for ids in chosen]
    model = load_base(base.folder, "fp32")
    attach(model, find_targets(model, "all-linear"), KasaConfig(rank=16, truncation="none", dropped_rank=0))
    # One after another in every repeat, so that a change in the machine's speed meets all alike.
    ways = _ways(samples)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, batches in ways.items():
            seconds[name].append(_training_pass(model, batches))
    gains = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["packed"], strict=True)) for name in ways
    }
    worst = _worst_difference(model, samples)
    tokens = sum(len(ids) for ids in chosen)
    details = {
        "tokens_per_second": {name: tokens / statistics.median(times) for name, times in seconds.items()},
        "packed_against": {name: gain for name, gain in gains.items() if name != "packed"},
        "tokens_per_sample": {"mean": tokens / len(chosen), "longest": max(map(len, chosen))},
        "largest_loss_difference": worst,
    }
    flaws = () if worst <= TOLERANCE else (f"a sample's mean loss differs by {worst:.1e}",)
    return Measurement(gains["padded, random order"], details, flaws=flaws)


def _ways(samples: Sequence[Sample]) -> dict[str, list[Batch]]:
    """The same samples in the same steps, shared out over forward passes in each way."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    steps = len(samples) // BATCH

    def batches(make: Callable[..., Batch], pack_tokens: int | None) -> list[Batch]:
        plan = BatchPlan(lengths, steps, BATCH, MICRO_BATCH, 1, 0, pack_tokens)
        passes = [chosen for step in range(steps) for chosen in plan.micro_batches(step, rank=0)]
        return [make([samples[index] for index in chosen]) for chosen in passes]

    random_order = [samples[start : start + MICRO_BATCH] for start in range(0, len(samples), MICRO_BATCH)]
    return {
        "padded, random order": [collate(chosen) for chosen in random_order],
        "padded, like lengths together": batches(collate, None),
        "packed": batches(pack, PACK_TOKENS),
    }


def _training_pass(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Seconds for forward and backward over all batches."""
    started = time.perf_counter()
    for batch in batches:
        label_losses(model, batch).sum().backward()
    model.zero_grad()
    return time.perf_counter() - started


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
