"""What dropping costs: the base before any training by rule and rank, and each rule after training with LoRA beside it.

In training every arm sees the same rows in the same order with the same schedule and rank; only the adapter differs. Each pair
of task and seed runs in a process of its own with one thread: `python -m benchmarks.checks.truncation WORKSPACE TASK SEED`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.core import Measurement, Setting, check
from benchmarks.inputs import TokenRows, base_of, text_sets, token_rows
from benchmarks.training import (
    ALPHA,
    RANK,
    Arm,
    Task,
    mean_loss,
    minilm_reviews,
    row_losses,
    run_trainings,
    shuffled_reviews,
    smollm2_reference,
    smollm2_reviews,
    train_adapter,
    weighting_of,
)
from kasa import (
    KasaConfig,
    ModelWeights,
    attach,
    compute_spectra,
    detach,
    find_targets,
    observe_layers,
)
from kasa.calibration import CalibrationSums
from kasa.spectra import Spectra
from kasa.targets import Target
from kasa.truncation import Truncation
from pipeline.models.loading import load_base
from pipeline.models.prompting import load_tokenizer
from pipeline.spectra.calibration import language_loss, read_texts

# The rule that is held against the others.
RULE: Truncation = "loss"
# Before any training.
RANKS = (8, 16, 32)
CALIBRATION_TOKENS, HELDOUT_TOKENS = 8192, 4096
# After training.
RULES: tuple[Truncation, ...] = ("none", "weight", "authors", "activation", "loss")
ARMS = ("lora", *RULES)
SEEDS = (0, 1, 2)
PEAK_RATE = 5e-4
# Two-sided 95% points of Student's t for the number of seeds less one.
T95 = {2: 4.303, 3: 3.182, 4: 2.776}


@check(bar=0.05, direction="at most", unit="nats")
def truncation(setting: Setting) -> Measurement:
    """Loss that the rule `loss` adds to SmolLM2-135M, all linear layers, worst of ranks 8, 16, 32 and two texts."""
    base = base_of(setting.workspace)
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
    return Measurement(worst[RULE], details)


@check(bar=0, direction="more than", unit="nats", judges="lower end of the 95% interval over seeds")
def truncation_training(setting: Setting) -> Measurement:
    """Held-out loss after training that dropping by weight loses against the rule `loss`, least of three tasks."""
    jobs = [(task, seed) for seed in SEEDS for task in TASKS]
    results: dict[str, list[dict[str, float]]] = {task: [] for task in TASKS}
    shuffled_reviews(setting.workspace)  # what is fetched is fetched before the processes would do so at once
    found = run_trainings("benchmarks.checks.truncation", [(setting.workspace, *job) for job in jobs])
    for (task, _), losses in zip(jobs, found, strict=True):
        results[task].append(losses)
    advantages = {task: advantage(runs, "weight") for task, runs in results.items()}
    least = min(advantages, key=lambda task: advantages[task]["low"])
    details = {
        "heldout_loss": {
            task: {arm: [round(run[arm], 4) for run in runs] for arm in ("base", *ARMS)}
            for task, runs in results.items()
        },
        f"{RULE}_against": {
            task: {arm: advantage(runs, arm) for arm in ARMS if arm != RULE} for task, runs in results.items()
        },
        "seeds": len(SEEDS),
        "rank": RANK,
        "task_of_the_figure": least,
    }
    return Measurement(advantages[least]["mean"], details, judged=advantages[least]["low"])


def calibrate(model: nn.Module, targets: list[Target], rows: TokenRows) -> CalibrationSums:
    """What rows of text do in the layers, gradients included."""
    with observe_layers(model, targets, gradients=True) as sums:
        for _ in read_texts(model, rows, gradients=True):
            pass
    return sums


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


def advantage(runs: Sequence[dict[str, float]], arm: str) -> dict[str, float]:
    """By how much the rule `loss` ends lower than `arm`: paired mean over seeds with its 95% t interval."""
    differences = [run[arm] - run[RULE] for run in runs]
    mean = statistics.fmean(differences)
    half = T95[len(runs) - 1] * statistics.stdev(differences) / len(runs) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def run_arms(workspace: Path, task_name: str, seed: int) -> dict[str, float]:
    """Held-out loss of the base, and of each arm after training."""
    torch.set_num_threads(1)
    losses: dict[str, float] = {}
    for arm in ARMS:
        started = time.perf_counter()
        torch.manual_seed(seed)
        task = TASKS[task_name](workspace)
        losses.setdefault("base", mean_loss(row_losses(task, task.heldout)))
        train_adapter(task, _arm(arm), PEAK_RATE, seed)
        losses[arm] = mean_loss(row_losses(task, task.heldout))
        print(
            f"{task_name} seed {seed} {arm}: {losses[arm]:.4f} ({time.perf_counter() - started:.0f} s)", file=sys.stderr
        )
    return losses


def _arm(name: str) -> Arm:
    """LoRA, or KaSA with d from a normal distribution, as in the paper."""
    rule = next((rule for rule in RULES if rule == name), None)
    if rule is None:
        return Arm()
    return Arm(KasaConfig(RANK, ALPHA, truncation=rule, dropped_rank=RANK, singular_value_start="normal"))


TASKS: dict[str, Callable[[Path], Task]] = {
    "SmolLM2-135M, movie reviews": smollm2_reviews,
    "SmolLM2-135M, Python reference": smollm2_reference,
    "MiniLM-L6 encoder, movie reviews": minilm_reviews,
}


if __name__ == "__main__":
    print(json.dumps(run_arms(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
