"""What dropping costs the base before any training, by rule and rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.core import CannotRunError, Measurement, Setting, check
from benchmarks.texts import TokenRows, text_sets, token_rows
from kasa import (
    InputSums,
    KasaConfig,
    KasaError,
    Spectra,
    Target,
    Truncation,
    attach,
    bottom_triplets,
    detach,
    find_targets,
    observe_inputs,
)
from pipeline.base_model import BaseModel, find_base, load_base
from pipeline.prepare.stage import load_tokenizer
from pipeline.recipe import BaseSettings
from pipeline.truncation import language_loss

RANKS = (8, 16, 32)
CALIBRATION_TOKENS = 8192
HELDOUT_TOKENS = 4096


@check(bar=0.05, direction="at most", unit="nats")
def truncation(setting: Setting) -> Measurement:
    """Loss that dropping by activation adds to SmolLM2-135M, all linear layers, worst of ranks 8, 16, 32 and two texts."""
    base = _base(setting)
    model = load_base(base.folder, "fp32").eval()
    targets = find_targets(model, "all-linear")
    tokenizer = load_tokenizer(base.folder)
    calibration: dict[str, TokenRows] = {}
    heldout: dict[str, TokenRows] = {}
    for name, (known, unknown) in text_sets(setting.workspace).items():
        calibration[name] = token_rows(known, tokenizer, CALIBRATION_TOKENS)
        heldout[name] = token_rows(unknown, tokenizer, HELDOUT_TOKENS)
    base_losses = {name: language_loss(model, rows) for name, rows in heldout.items()}
    by_weight = spectra_of(model, targets, max(RANKS))
    details: dict[str, Any] = {
        "base": base_losses,
        "weight": {name: costs(model, targets, by_weight, "weight", heldout[name]) for name in heldout},
        "authors": {name: costs(model, targets, by_weight, "authors", heldout[name]) for name in heldout},
        "activation": {},
        "activation, calibrated on the other text": {},
    }
    for name, rows in calibration.items():
        by_activation = spectra_of(model, targets, max(RANKS), input_sums(model, targets, rows))
        for other, unseen in heldout.items():
            place = "activation" if other == name else "activation, calibrated on the other text"
            details[place][other] = costs(model, targets, by_activation, "activation", unseen)
    worst = max(loss - base_losses[name] for name in heldout for loss in details["activation"][name].values())
    return Measurement(worst, {"losses": details, "calibration_tokens": CALIBRATION_TOKENS})


def input_sums(model: nn.Module, targets: list[Target], rows: TokenRows) -> InputSums:
    """The covariances of the layers' inputs over rows of text."""
    with observe_inputs(model, targets) as sums:
        language_loss(model, rows)
    return sums


def spectra_of(model: nn.Module, targets: list[Target], rank: int, sums: InputSums | None = None) -> Spectra:
    """Spectra of all targets of a model, weighted where `sums` are given."""
    return {
        target.name: bottom_triplets(
            weight_of(model, target), rank, target.name, None if sums is None else sums.covariance(target.name)
        )
        for target in targets
    }


def weight_of(model: nn.Module, target: Target) -> torch.Tensor:
    """A target's weight as out x in."""
    weight = model.get_parameter(f"{target.name}.weight").detach()
    return weight.T if target.transposed else weight


def costs(
    model: nn.Module, targets: list[Target], spectra: Spectra, rule: Truncation, rows: TokenRows
) -> dict[str, float]:
    """Rank -> loss of the truncated base."""
    return {str(rank): truncated_loss(model, targets, spectra, rule, rank, rows) for rank in RANKS}


def truncated_loss(
    model: nn.Module, targets: list[Target], spectra: Spectra, rule: Truncation, rank: int, rows: TokenRows
) -> float:
    """Loss of the base with the rule's part of every target dropped."""
    attach(model, targets, KasaConfig(rank=1, truncation=rule, dropped_rank=rank), spectra)
    try:
        return language_loss(model, rows)
    finally:
        detach(model)


def _base(setting: Setting) -> BaseModel:
    try:
        base = find_base(BaseSettings(), setting.workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None
    assert base is not None
    return base
