"""Validation during training: what is kept, when training ends, and that a kill changes neither."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kasa import attach_saved, read_adapter
from pipeline.config.recipe import Recipe, parse_recipe
from pipeline.models.forward import collate, label_losses
from pipeline.models.loading import load_base
from pipeline.training.step import ValidationHistory
from tests.support.small_training import STEPS, outcome, prepare_run, small_base, small_recipe, train_run

EVERY, PATIENCE = 3, 2


def history(losses: dict[int, float], patience: int | None = 2) -> ValidationHistory:
    return ValidationHistory(5, patience, losses)


def test_the_last_step_is_always_looked_at() -> None:
    assert [step for step in range(1, 13) if history({}).is_due(step, 12)] == [5, 10, 12]


def test_the_earliest_of_the_lowest_is_the_best() -> None:
    assert history({}).best_step is None
    assert history({5: 2.0, 10: 1.0, 12: 1.0}).best_step == 10


@pytest.mark.parametrize(
    ("losses", "patience", "exhausted"),
    [
        ({}, 1, False),
        ({5: 1.0, 10: 2.0}, 2, False),
        ({5: 1.0, 10: 2.0, 15: 1.0}, 2, True),
        ({5: 1.0, 10: 2.0, 15: 0.9}, 2, False),
        ({5: 1.0, 10: 2.0, 15: 3.0}, None, False),
    ],
)
def test_patience(losses: dict[int, float], patience: int | None, exhausted: bool) -> None:
    assert history(losses, patience).should_stop == exhausted


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """Validation samples that training can only make worse after a while: their tokens do not follow its rule."""
    folder = tmp_path_factory.mktemp("validation")
    base, spectra = small_base(folder)
    return folder, base, spectra


def validation_samples() -> list[dict[str, list[int]]]:
    generator = random.Random(1)
    rows = [[generator.randrange(1, 250) for _ in range(6 + index % 5)] for index in range(7)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def recipe_of(folder: Path, base: Path, stage: int, workers: int) -> Recipe:
    values = small_recipe(base, folder, stage, workers).model_dump(mode="json", by_alias=True)
    values["data"]["validation_rows"] = 7
    values["train"] |= {"validate_every": EVERY, "patience": PATIENCE, "checkpoints_kept": 1}
    return parse_recipe(values, "validation")


@pytest.mark.processes
@pytest.mark.parametrize("stage", [2, 3])
def test_the_best_adapter_is_kept_also_across_a_kill(inputs: tuple[Path, Path, dict[str, Any]], stage: int) -> None:
    folder, base, spectra = inputs
    outcomes = []
    for name, killed_after in (("undisturbed", None), ("killed", 7)):
        run, recipe = folder / f"{name}-{stage}", recipe_of(folder, base, stage, workers=2)
        prepare_run(run, spectra, validation_samples())
        if killed_after:
            train_run(recipe, run, killed_after)
        train_run(recipe, run)
        outcomes.append(outcome(run))
    (records, values), (again, values_again) = outcomes
    timeless = [{name: record.get(name) for name in ("step", "loss", "validation_loss")} for record in records]
    assert timeless == [{name: record.get(name) for name in ("step", "loss", "validation_loss")} for record in again]
    assert all(torch.equal(values[name], values_again[name]) for name in values)

    seen = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    assert list(seen) == list(range(EVERY, records[-1]["step"] + 1, EVERY))
    best = min(seen, key=lambda step: seen[step])
    assert records[-1]["step"] == best + PATIENCE * EVERY < STEPS

    model = load_base(base, "fp32")
    attach_saved(model, read_adapter(folder / f"killed-{stage}" / "work" / "adapter"))
    batch = collate(validation_samples())
    with torch.no_grad():
        loss = label_losses(model, batch).sum() / (batch.labels_BK >= 0).sum()
    assert float(loss) == pytest.approx(seen[best], abs=1e-5)
