"""Small trainings that checks of the method share: tasks, adapters beside each other, and held-out losses.

Every arm of a task sees the same rows in the same order with the same schedule and rank; only the adapter and, where a check
says so, the rate differ. Each training runs in a process of its own with one thread.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.core import ROOT, CannotRunError
from benchmarks.inputs import base_of, review_rows, text_sets, token_rows
from benchmarks.timing import answer_of, start_module
from kasa import KasaConfig, ModelWeights, attach, compute_spectra, find_targets, observe_layers, penalty
from kasa.calibration import CalibrationSums
from kasa.targets import Target
from kasa.truncation import CALIBRATED, Truncation
from kasa.weighting import Weighting
from pipeline.config.settings import BaseSettings
from pipeline.models.forward import collate, label_losses
from pipeline.models.loading import load_base
from pipeline.models.prompting import load_tokenizer
from pipeline.training.job import learning_rate

E2E = ROOT.parent / "shared" / "data" / "e2e"
RANK, ALPHA = 8, 16.0
CALIBRATION_ROWS = 48
WARMUP = 0.06
PROCESSES = 2

Sample = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A base with rows to learn from and rows held out; `losses` gives one loss for each label of a batch.

    Attributes:
        calibration: what the rules look at that look at text: of a causal model, with every token a label.
        heldout: rows of no document that is in `train`.
        batch: rows of a step.
        unlike: rows of another kind, on which what was forgotten shows; none under a new head.
        head: modules that every arm trains in full.
    """

    model: nn.Module
    calibration: Sequence[Sample]
    train: Sequence[Sample]
    heldout: Sequence[Sample]
    losses: Callable[[nn.Module, Sequence[Sample]], torch.Tensor]
    batch: int = 8
    unlike: Sequence[Sample] = ()
    head: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """An adapter of rank `RANK` and scale `ALPHA / RANK`.

    Attributes:
        kasa: the KaSA adapter; PEFT's LoRA where it is None.
        lora: what that LoRA's `LoraConfig` says beside rank, alpha and modules.
        gradient_start: that LoRA's A starts along the top right singular vectors of the loss's gradient at the base weights (sum over the
            labels of `CALIBRATION_ROWS` training rows), in the size of LoRA's start.
    """

    kasa: KasaConfig | None = None
    lora: Mapping[str, Any] = field(default_factory=dict)
    gradient_start: bool = False


@torch.inference_mode()
def row_losses(task: Task, rows: Sequence[Sample]) -> list[tuple[float, int]]:
    """(sum of the losses of its labels in nats, their number) of each row."""
    task.model.eval()
    found = [task.losses(task.model, [row]) for row in rows]
    return [(float(losses.sum()), losses.numel()) for losses in found]


def mean_loss(losses: Sequence[tuple[float, int]]) -> float:
    """The mean over all labels, in nats."""
    return sum(total for total, _ in losses) / sum(count for _, count in losses)


def train_adapter(task: Task, arm: Arm, rate: float, seed: int) -> None:
    """Train the arm's adapter for one pass over the rows."""
    model, regulariser = task.model, _adapted(task, arm, seed)
    order = list(task.train)
    random.Random(seed).shuffle(order)
    batches = [order[i : i + task.batch] for i in range(0, len(order), task.batch)]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), rate, WARMUP, "linear")
        (task.losses(model, batch).mean() + regulariser()).backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _adapted(task: Task, arm: Arm, seed: int) -> Callable[[], torch.Tensor]:
    """Put the arm's adapter in place; its regulariser."""
    targets = [target for target in find_targets(task.model, "all-linear") if target.name not in task.head]
    kasa = arm.kasa
    if kasa is None:
        _put_lora(task, arm, targets)
        return lambda: torch.zeros(())
    weighting = _weighting(task, targets, kasa.truncation) if kasa.truncation in CALIBRATED else None
    drops = kasa.truncation != "none"
    spectra = compute_spectra(ModelWeights(task.model), targets, RANK, weighting=weighting) if drops else None
    layers = attach(task.model, targets, kasa, spectra, seed, trained_modules=task.head)
    return lambda: penalty(layers.values(), kasa.regulariser).weighted(kasa)


def _put_lora(task: Task, arm: Arm, targets: Sequence[Target]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    starts = _pulled(task, targets) if arm.gradient_start else {}
    names = [target.name for target in targets]
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=names, **arm.lora)
    inject_adapter_in_model(config, task.model)
    for name in task.head:
        task.model.get_submodule(name).requires_grad_(True)
    for name, a_RI in starts.items():
        task.model.get_parameter(f"{name}.lora_A.default.weight").data.copy_(a_RI)


def _pulled(task: Task, targets: Sequence[Target]) -> dict[str, torch.Tensor]:
    """For each layer the A of a gradient start; its rows are orthogonal, each as long as one of LoRA's is at its start."""
    weights = {target.name: task.model.get_parameter(f"{target.name}.weight") for target in targets}
    task.model.requires_grad_(True)
    for sample in task.train[:CALIBRATION_ROWS]:
        task.losses(task.model, [sample]).sum().backward()
    started = {}
    for name, weight_OI in weights.items():
        assert weight_OI.grad is not None
        _, _, right_IR = torch.svd_lowrank(weight_OI.grad, q=2 * RANK, niter=4)
        started[name] = right_IR.T[:RANK] / 3**0.5  # a row of PEFT's Kaiming start has the expected squared length 1/3
    task.model.zero_grad()
    task.model.requires_grad_(False)
    return started


def weighting_of(sums: CalibrationSums, rule: Truncation) -> Callable[[str], Weighting]:
    """The weighting of a rule that looks at text."""
    if rule == "loss":
        return sums.weighting
    return lambda name: Weighting(sums.weighting(name).inputs_II)


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


def _all_labelled(rows: Sequence[Sequence[int]]) -> list[Sample]:
    return [{"input_ids": row, "labels": row} for row in rows]


def _answered(tokenizer: Any, prompt: str, answer: str) -> Sample:
    """A row whose answer alone is learned."""
    prompt_ids, answer_ids = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
    return {"input_ids": prompt_ids + answer_ids, "labels": [-100] * len(prompt_ids) + answer_ids}


def shuffled_reviews(workspace: Path) -> list[dict[str, str]]:
    """Movie reviews in an order that is always the same."""
    rows = review_rows(workspace)
    random.Random(0).shuffle(rows)
    return rows


def smollm2_reviews(workspace: Path) -> Task:
    """Grouped-query attention; the label is the one word that judges a review."""
    model, tokenizer = _smollm2(workspace)
    rows = [
        _answered(tokenizer, f"Review: {row['prompt']}\nSentiment (positive or negative):", f" {row['completion']}")
        for row in shuffled_reviews(workspace)[:400]
    ]
    calibration = _all_labelled([row["input_ids"] for row in rows[:CALIBRATION_ROWS]])
    return Task(model, calibration, rows[:240], rows[240:], _language_losses)


def _reference(workspace: Path, tokenizer: Any, tokens: tuple[int, int]) -> tuple[list[Sample], list[Sample]]:
    """Python's language reference, cut into rows, every token a label: (to learn from, held out)."""
    known, unknown = text_sets(workspace)["python reference"]
    return _all_labelled(token_rows(known, tokenizer, tokens[0])), _all_labelled(
        token_rows(unknown, tokenizer, tokens[1])
    )


def smollm2_reference(workspace: Path) -> Task:
    """Grouped-query attention; every token of Python's language reference is a label."""
    model, tokenizer = _smollm2(workspace)
    train, heldout = _reference(workspace, tokenizer, (6144, 3072))
    return Task(model, train[:CALIBRATION_ROWS], train, heldout, _language_losses)


def smollm2_long_reference(workspace: Path) -> Task:
    """The same for 40 steps, with movie reviews as the text that is unlike."""
    model, tokenizer = _smollm2(workspace)
    train, heldout = _reference(workspace, tokenizer, (10240, 6144))
    _, reviews = text_sets(workspace)["movie reviews"]
    unlike = _all_labelled(token_rows(reviews, tokenizer, 1024))
    return Task(model, train[:CALIBRATION_ROWS], train, heldout, _language_losses, batch=2, unlike=unlike)


def smollm2_e2e(workspace: Path) -> Task:
    """E2E restaurant descriptions, one reference for each of the held-out meanings, 60 steps.

    Raises:
        CannotRunError: The data is not here.
    """
    if not E2E.is_dir():
        raise CannotRunError(f"{E2E} is absent")
    model, tokenizer = _smollm2(workspace)

    def pairs(file: str) -> list[tuple[str, str]]:
        lines = (E2E / file).read_text(encoding="utf-8").splitlines()
        found = [(meaning.strip(), text.strip()) for meaning, _, text in (line.partition("||") for line in lines)]
        random.Random(0).shuffle(found)
        return found

    def rows(found: Sequence[tuple[str, str]]) -> list[Sample]:
        end = tokenizer.eos_token
        return [
            _answered(tokenizer, f"Restaurant data: {meaning}\nSentence:", f" {text}{end}") for meaning, text in found
        ]

    train, heldout = rows(pairs("valid.txt")[:120]), rows(list(dict(pairs("test.txt")).items())[:192])
    calibration = _all_labelled([row["input_ids"] for row in train[:CALIBRATION_ROWS]])
    _, unlike = _reference(workspace, tokenizer, (0, 1024))
    return Task(model, calibration, train, heldout, _language_losses, batch=2, unlike=unlike)


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

    rows = shuffled_reviews(workspace)[:2000]
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


def run_trainings(module: str, jobs: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """The JSON answer of `python -m MODULE JOB...` for each job, some side by side."""
    waiting = list(enumerate(jobs))
    running: dict[int, Any] = {}
    results: dict[int, dict[str, Any]] = {}
    while waiting or running:
        while waiting and len(running) < PROCESSES:
            index, job = waiting.pop(0)
            running[index] = start_module(module, *job, one_thread=True)
        for index, process in list(running.items()):
            if process.poll() is not None:
                results[index] = answer_of(running.pop(index))
        time.sleep(0.2)
    return [results[index] for index in range(len(jobs))]
