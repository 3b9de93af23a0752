"""The training worker at every ZeRO stage against a loop of plain torch with the paper's terms; workers come and go.

The loop shares no code with the layer, its regularisers or the optimizer step: each is written out as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from kasa import KasaConfig, attach, find_targets
from kasa.adapter import trainable_parameters
from kasa.spectra import Triplets
from pipeline.config.recipe import Recipe
from pipeline.core.files import Record
from pipeline.models.loading import load_base
from pipeline.training.job import BatchPlan, learning_rate
from tests.support.small_training import (
    BATCH,
    STEPS,
    Sample,
    outcome,
    prepare_run,
    small_base,
    small_recipe,
    small_samples,
    train_run,
)

pytestmark = [pytest.mark.soak, pytest.mark.xdist_group("plain-torch")]

# Nats over thirty steps in fp32, and units of the adapter's tensors.
SAME_LOSS = 1e-5
SAME_TENSORS = 1e-5
KILLED_AFTER = (10, 19)

Spectra = Mapping[str, Triplets]
Outcome = tuple[Sequence[Record], Mapping[str, torch.Tensor]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Spectra]:
    """A folder, a small base in it, and the base's spectra."""
    folder = tmp_path_factory.mktemp("plain-torch")
    return folder, *small_base(folder)


@pytest.fixture(scope="module")
def reference(inputs: tuple[Path, Path, Spectra]) -> Outcome:
    """What plain torch comes to; it learns something, so the comparison means something."""
    folder, base, spectra = inputs
    records, adapter = train_plainly(small_recipe(base, folder, 0, 1), spectra)
    assert records[-1]["loss"] < records[0]["loss"] - 0.1
    return records, adapter


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_thirty_steps_are_those_of_plain_torch(
    inputs: tuple[Path, Path, Spectra], reference: Outcome, stage: int, workers: int
) -> None:
    folder, base, spectra = inputs
    run = prepare_run(folder / f"zero-{stage}-{workers}", spectra)
    train_run(small_recipe(base, folder, stage, workers), run)
    assert_same(outcome(run), reference)
    # DeepSpeed does not tell the norm at stage 0.
    if stage:
        norms, expected = (
            [record["gradient_norm"] for record in records] for records in (outcome(run)[0], reference[0])
        )
        assert norms == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_killed_twice_and_resumed_by_other_numbers_of_workers_is_the_undisturbed_one(
    inputs: tuple[Path, Path, Spectra], stage: int
) -> None:
    folder, base, spectra = inputs
    undisturbed = prepare_run(folder / f"undisturbed-{stage}", spectra)
    train_run(small_recipe(base, folder, stage, 2), undisturbed)
    run = prepare_run(folder / f"elastic-{stage}", spectra)
    stretches = ((2, KILLED_AFTER[0]), (1, KILLED_AFTER[1]), (2, None))
    started_after = [train_run(small_recipe(base, folder, stage, workers), run, until) for workers, until in stretches]
    assert all(started_after[1:]), "it did not resume from a checkpoint"
    assert_same(outcome(run), outcome(undisturbed))


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    """Every step is there once, in order, with the same loss, and the adapters are the same."""
    (records, tensors), (expected, expected_tensors) = ours, theirs
    assert [record["step"] for record in records] == [record["step"] for record in expected]
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in expected], rel=0, abs=SAME_LOSS)
    for name, tensor in expected_tensors.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=SAME_TENSORS)


class PlainLayer(nn.Module):
    """KaSA as the paper writes it, on a weight truncated beforehand."""

    def __init__(
        self, linear: nn.Linear, dropped_OI: torch.Tensor, start: Mapping[str, torch.Tensor], scale: float
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach() - dropped_OI, requires_grad=False)
        self.a, self.d, self.b = (nn.Parameter(start[name].detach().clone()) for name in "adb")
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight + self.scale * self.b @ torch.diag(self.d) @ self.a)

    def penalties(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The authors' terms of one layer, with their large Gram matrices."""
        a_gram, b_gram = self.a.t() @ self.a, self.b @ self.b.t()
        return self.d.square().sum(), sum(torch.linalg.norm(gram - torch.eye(len(gram))) for gram in (a_gram, b_gram))


def train_plainly(recipe: Recipe, spectra: Spectra) -> Outcome:
    """Train with torch alone: one process, one sample after another."""
    settings, config, samples = recipe.train, recipe.kasa_config, small_samples()
    base = Path(recipe.base.model)
    started = load_base(base, "fp32")
    attach(started, find_targets(started, "all-linear"), config, spectra, settings.seed)
    model = load_base(base, "fp32").train().requires_grad_(False)
    layers = plain_layers(model, config, spectra, trainable_parameters(started))
    parameters = [parameter for layer in layers.values() for parameter in (layer.a, layer.d, layer.b)]
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay)
    order = BatchPlan(
        [len(s["input_ids"]) for s in samples], [], STEPS, BATCH, settings.micro_batch_size, 1, settings.seed
    )
    records = []
    for step in range(STEPS):
        rate = learning_rate(step, STEPS, settings.learning_rate, settings.warmup_share, settings.schedule)
        optimizer.param_groups[0]["lr"] = rate
        chosen = [samples[int(index)] for index in order.samples(step)]
        labels = sum(label >= 0 for sample in chosen for label in sample["labels"][1:])
        task = sum(loss_sum(model, sample) for sample in chosen) / labels
        squares, norms = zip(*(layer.penalties() for layer in layers.values()), strict=True)
        regularisers = config.singular_value_weight * sum(squares) + config.orthogonality_weight * sum(norms)
        loss = task + regularisers / len(layers)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, settings.gradient_clipping)
        optimizer.step()
        records.append({"step": step + 1, "loss": loss.item(), "gradient_norm": float(norm)})
    adapter = {f"{name}.{part}": getattr(layer, part).detach() for name, layer in layers.items() for part in "adb"}
    return records, adapter


def plain_layers(
    model: nn.Module, config: KasaConfig, spectra: Spectra, start: Mapping[str, torch.Tensor]
) -> dict[str, PlainLayer]:
    """Replace every linear layer of the model by a plain one with the adapter's start."""
    layers = {}
    for target in find_targets(model, "all-linear"):
        left_OD, right_DI = spectra[target.name].dropped_factors(config.dropped_rank)
        tensors = {part: start[f"{target.name}.{part}"] for part in "adb"}
        linear: Any = model.get_submodule(target.name)
        layers[target.name] = PlainLayer(linear, left_OD @ right_DI, tensors, config.scale)
        model.set_submodule(target.name, layers[target.name])
    return layers


def loss_sum(model: nn.Module, sample: Sample) -> torch.Tensor:
    """The loss of one sample, summed over its labels."""
    logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1]
    return functional.cross_entropy(logits, torch.tensor(sample["labels"][1:]), reduction="sum")
