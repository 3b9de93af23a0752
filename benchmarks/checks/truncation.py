"""What dropping costs the base before any training, by rule and rank."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from benchmarks.core import CannotRunError, Measurement, Setting, check
from benchmarks.texts import TokenRows, text_sets, token_rows
from kasa import KasaConfig, KasaError, ModelWeights, attach, compute_spectra, detach, find_targets, observe_layers
from kasa.calibration import CalibrationSums
from kasa.spectra import Spectra
from kasa.targets import Target
from kasa.truncation import Truncation
from kasa.weighting import Weighting
from pipeline.config.methods import AdapterSettings
from pipeline.config.settings import BaseSettings
from pipeline.models.base import BaseModel, find_base
from pipeline.models.loading import load_base
from pipeline.models.prompting import load_tokenizer
from pipeline.spectra.calibration import language_loss, read_texts

RANKS = (8, 16, 32)
CALIBRATION_TOKENS = 8192
HELDOUT_TOKENS = 4096


@check(bar=0.05, direction="at most", unit="nats")
def truncation(setting: Setting) -> Measurement:
    """Loss that the default truncation adds to SmolLM2-135M, all linear layers, worst of ranks 8, 16, 32 and two texts."""
    base = _base(setting)
    model = load_base(base.folder, "fp32").eval()
    targets = find_targets(model, "all-linear")
    tokenizer = load_tokenizer(base.folder)
    texts = {
        name: (token_rows(known, tokenizer, CALIBRATION_TOKENS), token_rows(unknown, tokenizer, HELDOUT_TOKENS))
        for name, (known, unknown) in text_sets(setting.workspace).items()
    }
    base_losses = {name: language_loss(model, heldout) for name, (_, heldout) in texts.items()}
    by_weight = compute_spectra(ModelWeights(model), targets, max(RANKS))
    losses: dict[str, dict[str, dict[str, float]]] = {
        rule: {name: costs(model, targets, by_weight, rule, heldout) for name, (_, heldout) in texts.items()}
        for rule in ("weight", "authors")
    }
    for name, (known, _) in texts.items():
        sums = calibrate(model, targets, known)
        for rule in ("activation", "loss"):
            spectra = compute_spectra(ModelWeights(model), targets, max(RANKS), weighting=weighting_of(sums, rule))
            for other, (_, heldout) in texts.items():
                place = rule if other == name else f"{rule}, calibrated on the other text"
                losses.setdefault(place, {})[other] = costs(model, targets, spectra, rule, heldout)
    rises = {
        place: {name: {rank: loss - base_losses[name] for rank, loss in ranks.items()} for name, ranks in found.items()}
        for place, found in losses.items()
    }
    worst = {place: max(max(ranks.values()) for ranks in found.values()) for place, found in rises.items()}
    details = {"base": base_losses, "rises": rises, "worst": worst, "calibration_tokens": CALIBRATION_TOKENS}
    return Measurement(worst[AdapterSettings().truncation], details)


def calibrate(model: nn.Module, targets: list[Target], rows: TokenRows) -> CalibrationSums:
    """What rows of text do in the layers, gradients included."""
    with observe_layers(model, targets, gradients=True) as sums:
        for _ in read_texts(model, rows, gradients=True):
            pass
    return sums


def weighting_of(sums: CalibrationSums, rule: Truncation) -> Callable[[str], Weighting]:
    """The weighting of a rule that looks at text."""
    if rule == "loss":
        return sums.weighting
    return lambda name: Weighting(sums.weighting(name).inputs_II)


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
