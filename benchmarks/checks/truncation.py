"""What dropping costs: the base before any training by rule and rank, and each rule after training with LoRA beside it.

In training every arm sees the same rows in the same order with the same schedule and rank; only the adapter differs. Each pair
of task and seed runs in a process of its own with one thread: `python -m benchmarks.checks.truncation WORKSPACE TASK SEED`.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.core import Measurement, Setting, check
from benchmarks.inputs import TokenRows, base_of, review_rows, text_sets, token_rows
from benchmarks.timing import answer_of, start_module
from kasa import (
    KasaConfig,
    ModelWeights,
    attach,
    compute_spectra,
    detach,
    find_targets,
    observe_layers,
    penalty,
)
from kasa.calibration import CalibrationSums
from kasa.spectra import Spectra
from kasa.targets import Target
from kasa.truncation import CALIBRATED, Truncation
from kasa.weighting import Weighting
from pipeline.config.methods import AdapterSettings
from pipeline.config.settings import BaseSettings
from pipeline.models.forward import collate, label_losses
from pipeline.models.loading import load_base
from pipeline.models.prompting import load_tokenizer
from pipeline.spectra.calibration import language_loss, read_texts
from pipeline.training.job import learning_rate

DEFAULT = AdapterSettings().truncation
# Before any training.
RANKS = (8, 16, 32)
CALIBRATION_TOKENS, HELDOUT_TOKENS = 8192, 4096
# After training.
RULES: tuple[Truncation, ...] = ("none", "weight", "authors", "activation", "loss")
ARMS = ("lora", *RULES)
SEEDS = (0, 1, 2)
RANK, ALPHA, PEAK_RATE, BATCH = 8, 16.0, 5e-4, 8
CALIBRATION_ROWS = 48
# Two-sided 95% points of Student's t for the number of seeds less one.
T95 = {2: 4.303, 3: 3.182, 4: 2.776}
PROCESSES = 2

Sample = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A base with rows to learn from and rows held out; `losses` gives one loss for each label of a batch.

    `calibration` is what the rules look at that look at text: of a causal model, with every token a label.
    """

    model: nn.Module
    calibration: Sequence[Sample]
    train: Sequence[Sample]
    heldout: Sequence[Sample]
    losses: Callable[[nn.Module, Sequence[Sample]], torch.Tensor]
    head: tuple[str, ...] = ()


@check(bar=0.05, direction="at most", unit="nats")
def truncation(setting: Setting) -> Measurement:
    """Loss that the default truncation adds to SmolLM2-135M, all linear layers, worst of ranks 8, 16, 32 and two texts."""
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
    return Measurement(worst[DEFAULT], details)


@check(bar=0, direction="more than", unit="nats", judges="lower end of the 95% interval over seeds")
def truncation_training(setting: Setting) -> Measurement:
    """Held-out loss after training that dropping by weight loses against the default rule, least of three tasks."""
    jobs = [(task, seed) for seed in SEEDS for task in TASKS]
    results: dict[str, list[dict[str, float]]] = {task: [] for task in TASKS}
    for (task, _), losses in zip(jobs, _run_jobs(setting.workspace, jobs), strict=True):
        results[task].append(losses)
    advantages = {task: advantage(runs, "weight") for task, runs in results.items()}
    least = min(advantages, key=lambda task: advantages[task]["low"])
    details = {
        "heldout_loss": {
            task: {arm: [round(run[arm], 4) for run in runs] for arm in ("base", *ARMS)}
            for task, runs in results.items()
        },
        f"{DEFAULT}_against": {
            task: {arm: advantage(runs, arm) for arm in ARMS if arm != DEFAULT} for task, runs in results.items()
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


def advantage(runs: Sequence[dict[str, float]], arm: str) -> dict[str, float]:
    """By how much the default rule ends lower than `arm`: paired mean over seeds with its 95% t interval."""
    differences = [run[arm] - run[DEFAULT] for run in runs]
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
        losses.setdefault("base", heldout_loss(task))
        _train(task, arm, seed)
        losses[arm] = heldout_loss(task)
        print(
            f"{task_name} seed {seed} {arm}: {losses[arm]:.4f} ({time.perf_counter() - started:.0f} s)", file=sys.stderr
        )
    return losses


@torch.inference_mode()
def heldout_loss(task: Task) -> float:
    """Mean loss over all held-out labels."""
    task.model.eval()
    batches = [task.losses(task.model, task.heldout[i : i + BATCH]) for i in range(0, len(task.heldout), BATCH)]
    return float(torch.cat(batches).mean())


def _train(task: Task, arm: str, seed: int) -> None:
    model, regulariser = _adapted(task, arm, seed)
    order = list(task.train)
    random.Random(seed).shuffle(order)
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), PEAK_RATE, 0.06, "linear")
        (task.losses(model, batch).mean() + regulariser()).backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _adapted(task: Task, arm: str, seed: int) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """The model with the arm's adapter in place, and the arm's regulariser."""
    targets = [target for target in find_targets(task.model, "all-linear") if target.name not in task.head]
    if arm == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        names = [target.name for target in targets]
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=names), task.model)
        for name in task.head:
            task.model.get_submodule(name).requires_grad_(True)
        return task.model, lambda: torch.zeros(())
    rule = next(rule for rule in RULES if rule == arm)
    config = KasaConfig(rank=RANK, alpha=ALPHA, truncation=rule, dropped_rank=RANK)
    weighting = _weighting(task, targets, rule) if rule in CALIBRATED else None
    spectra = None if rule == "none" else compute_spectra(ModelWeights(task.model), targets, RANK, weighting=weighting)
    layers = attach(task.model, targets, config, spectra, seed, trained_modules=task.head)
    return task.model, lambda: penalty(layers.values(), config.regulariser).weighted(config)


def _weighting(task: Task, targets: Sequence[Target], rule: Truncation) -> Callable[[str], Weighting]:
    with observe_layers(task.model, targets, gradients=True) as sums:
        for sample in task.calibration:
            task.losses(task.model, [sample]).sum().backward()
    return weighting_of(sums, rule)


def _language_losses(model: nn.Module, samples: Sequence[Sample]) -> torch.Tensor:
    batch = collate(samples)
    return label_losses(model, batch)[batch.labels_BK >= 0]


def _smollm2(workspace: Path) -> tuple[nn.Module, Any]:
    folder = base_of(workspace).folder
    return load_base(folder, "fp32"), load_tokenizer(folder)


def _all_labelled(samples: Sequence[Sample]) -> list[Sample]:
    return [{**sample, "labels": sample["input_ids"]} for sample in samples]


def _shuffled_reviews(workspace: Path) -> list[dict[str, str]]:
    rows = review_rows(workspace)
    random.Random(0).shuffle(rows)
    return rows


def smollm2_reviews(workspace: Path) -> Task:
    """Grouped-query attention; the label is the one word that judges a review."""
    model, tokenizer = _smollm2(workspace)

    def sample(row: dict[str, str]) -> Sample:
        prompt = tokenizer(f"Review: {row['prompt']}\nSentiment (positive or negative):")["input_ids"]
        answer = tokenizer(f" {row['completion']}")["input_ids"]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    rows = [sample(row) for row in _shuffled_reviews(workspace)[:400]]
    return Task(model, _all_labelled(rows[:CALIBRATION_ROWS]), rows[:240], rows[240:], _language_losses)


def smollm2_reference(workspace: Path) -> Task:
    """Grouped-query attention; every token of Python's language reference is a label."""
    model, tokenizer = _smollm2(workspace)
    known, unknown = text_sets(workspace)["python reference"]
    train, heldout = (
        [{"input_ids": row, "labels": row} for row in token_rows(texts, tokenizer, limit)]
        for texts, limit in ((known, 6144), (unknown, 3072))
    )
    return Task(model, train[:CALIBRATION_ROWS], train, heldout, _language_losses)


def minilm_reviews(workspace: Path) -> Task:
    """An encoder with full multi-head attention and a new classification head, which every arm trains."""
    from transformers import AutoModelForSequenceClassification

    with _quiet():
        folder = base_of(workspace, BaseSettings(model="embedded:all-minilm-l6-v2")).folder
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)

    def losses(model: nn.Module, samples: Sequence[Sample]) -> torch.Tensor:
        encoded = tokenizer([row["prompt"] for row in samples], padding=True, return_tensors="pt")
        labels = torch.tensor([row["completion"] == "positive" for row in samples]).long()
        return functional.cross_entropy(model(**encoded).logits, labels, reduction="none")

    rows = _shuffled_reviews(workspace)[:2000]
    return Task(model, rows[:CALIBRATION_ROWS], rows[:1200], rows[1200:], losses, head=("classifier",))


@contextmanager
def _quiet() -> Iterator[None]:
    """A head that is missing from the checkpoint is what we want, and no reason for a table of warnings."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


TASKS: dict[str, Callable[[Path], Task]] = {
    "SmolLM2-135M, movie reviews": smollm2_reviews,
    "SmolLM2-135M, Python reference": smollm2_reference,
    "MiniLM-L6 encoder, movie reviews": minilm_reviews,
}


def _run_jobs(workspace: Path, jobs: Sequence[tuple[str, int]]) -> list[dict[str, float]]:
    """Results of `run_arms` for each job, some side by side."""
    _shuffled_reviews(workspace)  # what is fetched is fetched before the processes would do so at once
    waiting = list(enumerate(jobs))
    running: dict[int, subprocess.Popen[str]] = {}
    results: dict[int, dict[str, float]] = {}
    while waiting or running:
        while waiting and len(running) < PROCESSES:
            index, (task, seed) = waiting.pop(0)
            running[index] = start_module("benchmarks.checks.truncation", workspace, task, seed, one_thread=True)
        for index, process in list(running.items()):
            if process.poll() is not None:
                results[index] = answer_of(running.pop(index))
        time.sleep(0.2)
    return [results[index] for index in range(len(jobs))]


if __name__ == "__main__":
    print(json.dumps(run_arms(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
