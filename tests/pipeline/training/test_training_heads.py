"""Training a new head beside the adapter: at every ZeRO stage, killed and gone on with, and at a rate of its own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kasa import attach_saved, compute_spectra, read_adapter
from kasa.model_spectra import ModelWeights
from pipeline.config.recipe import Recipe, parse_recipe
from pipeline.models.base import BaseModel
from pipeline.models.forward import collate_labelled, head_outputs, padding_token
from pipeline.models.loading import load_base
from pipeline.models.prompting import Head
from pipeline.training.step import LabelObjective
from tests.support.encoders import write_encoder
from tests.support.ranks import write_inputs
from tests.support.small_training import outcome, train_run

STEPS, SAMPLES, PERSISTENT_ELEMENTS = 12, 48, 100
HEADS = {
    "classification": Head("classification", ("low", "middle", "high"), pairs=True),
    "regression": Head("regression", (), pairs=True),
}


def rows_of(kind: str) -> list[dict[str, Any]]:
    """Texts whose label is to be seen in one token."""
    generator = random.Random(0)
    rows = []
    for index in range(SAMPLES):
        body = [generator.randrange(8, 60) for _ in range(4 + index % 9)]
        ids, label = [2, 5 + index % 3, *body, 3], index % 3
        types = [0] * 3 + [1] * (len(ids) - 3)
        rows.append(
            {"input_ids": ids, "token_type_ids": types, "label": float(label) * (1 if kind != "regression" else 0.7)}
        )
    return rows


def recipe_of(folder: Path, kind: str, stage: int, **train: Any) -> Recipe:
    deepspeed = f"cpu_zero{stage}"
    if stage == 3:
        section = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS}
        (folder / "zero3.json").write_text(json.dumps({"zero_optimization": section}), encoding="utf-8")
        deepspeed = str(folder / "zero3.json")
    settings = {
        "workers": 2, "deepspeed": deepspeed, "precision": "fp32", "max_steps": STEPS, "epochs": 9, "batch_size": 9,
        "micro_batch_size": 2, "learning_rate": 2e-3, "head_learning_rate": 2e-2, "checkpoint_every": 4, "validate_every": 5,
    }  # fmt: skip
    return parse_recipe(
        {
            "name": "heads",
            "base": {"model": str(folder / "base"), "head": kind},
            "data": {"train": "rows.jsonl", "validation_rows": 5},
            "adapter": {"rank": 4, "truncation": "weight"},
            "train": settings | train,
        },
        "heads",
    )


def prepare(run: Path, base: Path, kind: str) -> Path:
    head = HEADS[kind]
    targets = BaseModel("base", base, head.kind).targets("all-linear")
    spectra = compute_spectra(ModelWeights(load_base(base, "fp32", head)), targets, 4)
    rows = rows_of(kind)
    write_inputs(run, rows, spectra, rows[:5], head)
    return run


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "architecture", "stage", "precision"),
    [("regression", "deberta-v2", 2, "bf16")],
)
def test_a_killed_training_ends_in_the_same_bits(
    kind: str, architecture: Any, stage: int, precision: str, tmp_path: Path
) -> None:
    base = write_encoder(tmp_path / "base", architecture)
    recipe = recipe_of(tmp_path, kind, stage, precision=precision)
    undisturbed, killed = (prepare(tmp_path / name, base, kind) for name in ("undisturbed", "killed"))
    train_run(recipe, undisturbed)
    train_run(recipe, killed, kill_after=6)
    assert train_run(recipe, killed) in (4, 5)
    (records, tensors), (resumed_records, resumed) = outcome(undisturbed), outcome(killed)
    assert len(records) == len(resumed_records) == STEPS
    assert [record["task_loss"] for record in records] == [record["task_loss"] for record in resumed_records]
    assert not [name for name in tensors if not torch.equal(tensors[name], resumed[name])]
    assert all("validation_loss" in records[step - 1] for step in (5, 10, STEPS))
    assert records[-1]["task_loss"] < records[0]["task_loss"]

    # Head and all: what was saved gives other answers than what training began with.
    adapter, head = read_adapter(killed / "work" / "adapter"), HEADS[kind]
    assert {name.partition(".")[0] for name in adapter.trained_modules} <= {"classifier", "pooler"}
    assert "classifier" in adapter.trained_modules
    model = load_base(base, precision, head, recipe.train.seed).eval()
    batch = collate_labelled(rows_of(kind), padding_token(model))
    with torch.no_grad():
        before = head_outputs(model, batch)
        attach_saved(model, adapter)
        after = head_outputs(model, batch)
    assert after.dtype == torch.float32
    objective = LabelObjective(head, 0, 1.0)
    losses = [objective.losses(_Said(outputs), batch).mean() for outputs in (before, after)]
    assert losses[1] < losses[0]


class _Said(torch.nn.Module):
    """Gives the answers it was made with."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return self


def test_a_new_head_is_the_same_in_every_process_and_for_every_checkpoint(tmp_path: Path) -> None:
    base = write_encoder(tmp_path / "base", "bert")
    first, again, other = (load_base(base, "bf16", HEADS["classification"], seed) for seed in (1, 1, 2))
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert first.classifier.weight.dtype == torch.float32
    assert first.config.id2label == {0: "low", 1: "middle", 2: "high"}
    # A checkpoint with a head of its own, of another size, is as good as one without.
    load_base(base, "fp32", Head("classification", ("a", "b")), 5).save_pretrained(tmp_path / "headed")
    assert torch.equal(
        load_base(tmp_path / "headed", "bf16", HEADS["classification"], 1).classifier.weight, first.classifier.weight
    )
