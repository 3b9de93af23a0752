"""The audit of a truncation: what it costs the base model on held-out text, in all and layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kasa import KasaConfig, attach, detach
from kasa.audit import observe_dropped
from kasa.spectra import Spectra
from kasa.spectra_file import load_spectra
from kasa.targets import Target
from kasa.truncation import dropped_rank
from pipeline.core.files import append_journal
from pipeline.data.prepared import load_prepared
from pipeline.models.forward import Sample, changed_share, features
from pipeline.spectra.calibration import equal_length_batches, first_rows, language_loss, load_on_device, token_count

# The layers that lose the largest share of their output are truncated one at a time, to see what each costs alone.
WORST_LAYERS = 5


@dataclass(frozen=True)
class AuditJob:
    """The comparison of the base with the truncated base, on the first `tokens` held-out tokens.

    Attributes:
        base_folder: the base model.
        prepared: folder of the prepared data.
        precision: `fp32` or `bf16`.
        spectra: folder of the spectra.
        targets: the layers that are truncated.
        config: how they are truncated.
        tokens: length of the text.
        out: JSON file for the result.
        journal: file for the progress.
    """

    base_folder: Path
    prepared: Path
    precision: str
    spectra: Path
    targets: tuple[Target, ...]
    config: KasaConfig
    tokens: int
    out: Path
    journal: Path


def audit_truncation(job: AuditJob) -> dict[str, Any]:
    """Measure what a truncation costs, write the result to `job.out`, and return it without the values per layer.

    The result has the loss of the base and of the truncated base, the share of its output that each layer loses, and the loss
    with each of the worst layers truncated alone. The untrained output of a new head says nothing of the base, so with one
    the loss is the share of the head's input features that changes (`changed_share`): 0 for the base.
    """
    torch.set_num_threads(1)
    prepared = load_prepared(job.prepared)
    rows = first_rows(prepared.heldout, job.tokens)
    texts = [prepared.heldout[row]["input_ids"] for row in rows]
    model = load_on_device(job.base_folder, job.precision, prepared.head)
    spectra, _ = load_spectra(job.spectra)
    if prepared.head.is_new:
        measure = _feature_change(model, [prepared.heldout[row] for row in rows])
    else:
        measure = partial(language_loss, model, texts)

    def loss_of(targets: Sequence[Target]) -> float:
        attach(model, targets, job.config, spectra)
        try:
            return _journalled(job, measure())
        finally:
            detach(model)

    with observe_dropped(model, dropped_parts(job.targets, job.config, spectra)) as observed:
        base_loss = _journalled(job, measure())
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
    """A function that returns how much the head's input features have changed since its first call."""
    batches = equal_length_batches(samples, token_count)
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
    """The dropped factors U_d S_d and V_d^T of each layer that loses something, by its name."""
    ranks = {target.name: dropped_rank(target, config.truncation, config.dropped_rank) for target in targets}
    return {name: spectra[name].dropped_factors(rank) for name, rank in ranks.items() if rank}


def _journalled(job: AuditJob, loss: float) -> float:
    append_journal(job.journal, [{"loss": loss}])
    return loss
