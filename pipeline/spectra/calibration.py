"""Calibration text through the base model, to see what a truncation may take from each layer.

Only samples of one length share a forward pass: nothing is padded, so every position counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from kasa import observe_layers
from kasa.calibration import save_sums
from kasa.targets import Target
from pipeline.core.files import append_journal, rewrite_journal
from pipeline.data.prepared import load_prepared
from pipeline.models.forward import Sample, collate, label_losses, read_samples
from pipeline.models.loading import load_base
from pipeline.models.prompting import Head

TOKENS_PER_BATCH = 1024

TokenIds = Sequence[int]
Text = TypeVar("Text")


@dataclass(frozen=True)
class CalibrationShard:
    """One worker's share of the calibration text: the rows `index`, `index + count`, ... of the first `tokens` tokens.

    Attributes:
        base_folder: the base model.
        prepared: folder of the prepared data.
        precision: `fp32` or `bf16`.
        targets: the layers to observe.
        tokens: length of the calibration text.
        gradients: whether the second moments of output gradients are summed up too, beside those of the inputs.
        index: number of this shard.
        count: how many shards there are.
        out: file for the sums.
        journal: file for the progress.
    """

    base_folder: Path
    prepared: Path
    precision: str
    targets: tuple[Target, ...]
    tokens: int
    gradients: bool
    index: int
    count: int
    out: Path
    journal: Path


def calibrate_shard(shard: CalibrationShard) -> None:
    """Sum up second moments of the layers over the rows of the shard, and save the sums."""
    torch.set_num_threads(1)
    prepared = load_prepared(shard.prepared)
    samples = prepared.calibration
    rows = first_rows(samples, shard.tokens)[shard.index :: shard.count]
    rewrite_journal(shard.journal, keep=lambda record: False)
    model = load_on_device(shard.base_folder, shard.precision, prepared.head)
    if prepared.head.is_new:
        batches = equal_length_batches([samples[row] for row in rows], token_count)
        batch_tokens = read_samples(model, batches, shard.gradients)
    else:
        batch_tokens = read_texts(model, [samples[row]["input_ids"] for row in rows], shard.gradients)
    with observe_layers(model, shard.targets, shard.gradients) as sums:
        for tokens in batch_tokens:
            append_journal(shard.journal, [{"tokens": tokens}])
    save_sums(shard.out, sums)


def read_texts(model: nn.Module, texts: Sequence[TokenIds], gradients: bool) -> Iterator[int]:
    """Run texts through the model, and with `gradients` their loss backward.

    Yields:
        The tokens of each batch, after it.
    """
    for batch in equal_length_batches(texts):
        with torch.set_grad_enabled(gradients):
            losses = _token_losses(model, batch)
        if gradients:
            losses.sum().backward()
        yield sum(map(len, batch))


@torch.inference_mode()
def language_loss(model: nn.Module, texts: Sequence[TokenIds]) -> float:
    """Mean cross entropy in nats over all tokens of the texts except the first of each."""
    losses = [_token_losses(model, batch).flatten() for batch in equal_length_batches(texts)]
    return float(torch.cat(losses).double().mean())


def first_rows(samples: Any, tokens: int) -> range:
    """The first rows that together have at least `tokens` tokens, or all of them."""
    total = 0
    for row, ids in enumerate(samples["input_ids"]):
        total += len(ids)
        if total >= tokens:
            return range(row + 1)
    return range(len(samples))


def equal_length_batches(texts: Sequence[Text], length_of: Callable[[Text], int] = len) -> list[list[Text]]:  # type: ignore[assignment]
    """Texts in batches of one length and at most `TOKENS_PER_BATCH` tokens (or one text), the longest first."""
    by_length: defaultdict[int, list[Text]] = defaultdict(list)
    for text in texts:
        by_length[length_of(text)].append(text)
    batches = []
    for length in sorted(by_length, reverse=True):
        size = max(1, TOKENS_PER_BATCH // length)
        batches += [by_length[length][start : start + size] for start in range(0, len(by_length[length]), size)]
    return batches


def token_count(sample: Sample) -> int:
    """Length of a tokenised sample."""
    return len(sample["input_ids"])


def load_on_device(folder: Path, precision: str, head: Head) -> nn.Module:
    """The base model in evaluation mode, on the GPU if there is one."""
    return load_base(folder, precision, head).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _token_losses(model: nn.Module, texts: Sequence[TokenIds]) -> torch.Tensor:
    """Cross entropy in nats of all tokens but the first of B texts of one length T; shape (B, T - 1)."""
    batch = collate([{"input_ids": text, "labels": text} for text in texts])
    return label_losses(model, batch.to(next(model.parameters()).device))[:, : len(texts[0]) - 1]
