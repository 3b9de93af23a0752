"""What the spectra and audit stages run on the cluster: real text through the base, to see what truncation may take.

Only samples of one length share a pass: nothing is padded, so that every position counts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from kasa import KasaConfig, attach, detach, observe_layers
from kasa.audit import observe_dropped
from kasa.calibration import save_sums
from kasa.spectra import Spectra
from kasa.spectra_file import load_spectra
from kasa.targets import Target
from kasa.truncation import dropped_rank
from pipeline.core.journal import append_journal, rewrite_journal
from pipeline.data.prepared import load_prepared
from pipeline.models.heads import Head
from pipeline.models.language_model import collate, label_losses
from pipeline.models.loading import load_base
from pipeline.models.sequence_classification import Sample, changed_share, features, read_samples

# The layers that lose the largest share of their output are truncated one at a time, to see what each costs alone.
WORST_LAYERS = 5
PASS_TOKENS = 1024

TokenIds = Sequence[int]
Text = TypeVar("Text")


@dataclass(frozen=True)
class CalibrationShard:
    """One worker's part of the calibration text: the rows `index`, `index + count`, ... of the first `tokens` tokens.

    With `gradients` the loss's gradients are summed up as well as the layers' inputs.
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


@dataclass(frozen=True)
class AuditJob:
    """What an audit compares: the base, and the base truncated as `config` says, on the first held-out `tokens` tokens."""

    base_folder: Path
    prepared: Path
    precision: str
    spectra: Path
    targets: tuple[Target, ...]
    config: KasaConfig
    tokens: int
    out: Path
    journal: Path


def calibrate_shard(shard: CalibrationShard) -> None:
    """Sum up what the shard's rows do in the layers, and save the sums."""
    torch.set_num_threads(1)
    prepared = load_prepared(shard.prepared)
    samples = prepared.calibration
    rows = first_rows(samples, shard.tokens)[shard.index :: shard.count]
    rewrite_journal(shard.journal, keep=lambda record: False)
    model = _load(shard.base_folder, shard.precision, prepared.head)
    if prepared.head.is_new:
        batches = equal_length_batches([samples[row] for row in rows], _length)
        passes = read_samples(model, batches, shard.gradients)
    else:
        passes = read_texts(model, [samples[row]["input_ids"] for row in rows], shard.gradients)
    with observe_layers(model, shard.targets, shard.gradients) as sums:
        for tokens in passes:
            append_journal(shard.journal, [{"tokens": tokens}])
    save_sums(shard.out, sums)


def read_texts(model: nn.Module, texts: Sequence[TokenIds], gradients: bool) -> Iterator[int]:
    """Run texts through the model, and with `gradients` their loss backward; the tokens of each pass."""
    for batch in equal_length_batches(texts):
        with torch.set_grad_enabled(gradients):
            losses = _token_losses(model, batch)
        if gradients:
            losses.sum().backward()
        yield sum(map(len, batch))


def audit_truncation(job: AuditJob) -> dict[str, Any]:
    """Losses of the base and of the truncated base, the share of its output that each layer loses, and the worst layers
    truncated alone. Writes all of it to `audit.json`; returns what is not per layer.

    Below a new head the loss is the share of what the head reads that changes (`pipeline.models.sequence_classification`), of the base 0.
    """
    torch.set_num_threads(1)
    prepared = load_prepared(job.prepared)
    rows = first_rows(prepared.heldout, job.tokens)
    texts = [prepared.heldout[row]["input_ids"] for row in rows]
    model = _load(job.base_folder, job.precision, prepared.head)
    spectra, _ = load_spectra(job.spectra)
    if prepared.head.is_new:
        measure = _feature_change(model, [prepared.heldout[row] for row in rows])
    else:
        measure = partial(language_loss, model, texts)

    def loss_of(targets: Sequence[Target]) -> float:
        attach(model, targets, job.config, spectra)
        try:
            return _counted(job, measure())
        finally:
            detach(model)

    with observe_dropped(model, dropped_parts(job.targets, job.config, spectra)) as observed:
        base_loss = _counted(job, measure())
    shares = observed.shares()
    truncated_loss = loss_of(job.targets)
    by_share = sorted((t for t in job.targets if t.name in shares), key=lambda target: -shares[target.name])
    facts = {
        "tokens": sum(map(len, texts)),
        "base_loss": base_loss,
        "truncated_loss": truncated_loss,
        "worst": [{"name": target.name, "loss": loss_of([target])} for target in by_share[:WORST_LAYERS]],
    }
    job.out.write_text(json.dumps({**facts, "shares": shares}, indent=1), encoding="utf-8")
    return facts


def _feature_change(model: nn.Module, samples: Sequence[Sample]) -> Callable[[], float]:
    """How far what the head reads of the samples has moved from what it was at the first call."""
    batches = equal_length_batches(samples, _length)
    first: list[torch.Tensor] = []

    def measure() -> float:
        with torch.inference_mode():
            now = [features(model, batch) for batch in batches]
        if not first:
            first.extend(now)
        return changed_share(first, now)

    return measure


def dropped_parts(
    targets: Sequence[Target], config: KasaConfig, spectra: Spectra
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factor pairs of all layers that lose something."""
    ranks = {target.name: dropped_rank(target, config.truncation, config.dropped_rank) for target in targets}
    return {name: spectra[name].dropped_factors(rank) for name, rank in ranks.items() if rank}


def first_rows(samples: Any, tokens: int) -> range:
    """The first rows that together have at least `tokens` tokens, or all of them."""
    total = 0
    for row, ids in enumerate(samples["input_ids"]):
        total += len(ids)
        if total >= tokens:
            return range(row + 1)
    return range(len(samples))


def equal_length_batches(texts: Sequence[Text], length_of: Callable[[Text], int] = len) -> list[list[Text]]:  # type: ignore[assignment]
    """The texts, longest first, in batches of one length and about `PASS_TOKENS` tokens at most."""
    by_length: defaultdict[int, list[Text]] = defaultdict(list)
    for text in texts:
        by_length[length_of(text)].append(text)
    batches = []
    for length in sorted(by_length, reverse=True):
        size = max(1, PASS_TOKENS // length)
        batches += [by_length[length][start : start + size] for start in range(0, len(by_length[length]), size)]
    return batches


@torch.inference_mode()
def language_loss(model: nn.Module, texts: Sequence[TokenIds]) -> float:
    """Mean cross entropy in nats over every token of the texts but each one's first."""
    losses = [_token_losses(model, batch).flatten() for batch in equal_length_batches(texts)]
    return float(torch.cat(losses).double().mean())


def _token_losses(model: nn.Module, texts: Sequence[TokenIds]) -> torch.Tensor:
    """Cross entropy in nats of every token but each text's first; the texts, of one length T, as (B, T - 1)."""
    batch = collate([{"input_ids": text, "labels": text} for text in texts])
    return label_losses(model, batch.to(next(model.parameters()).device))[:, : len(texts[0]) - 1]


def _length(sample: Sample) -> int:
    return len(sample["input_ids"])


def _load(folder: Path, precision: str, head: Head) -> nn.Module:
    return load_base(folder, precision, head).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _counted(job: AuditJob, loss: float) -> float:
    append_journal(job.journal, [{"loss": loss}])
    return loss
