"""One rank of `test_methods.py`: the pipeline's training worker with every method, undisturbed, and interrupted and resumed.

usage: python method_script.py FOLDER STAGE PRECISION METHOD...
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from pipeline.config.recipe import Recipe  # noqa: E402
from pipeline.core.files import ADAPTER, read_journal  # noqa: E402
from pipeline.methods.loading import attach_folder  # noqa: E402
from pipeline.models.forward import collate, label_losses  # noqa: E402
from pipeline.models.loading import load_base  # noqa: E402
from pipeline.spectra.decomposition import leading_triplets  # noqa: E402
from pipeline.training.job import ATTACHED, JOURNAL  # noqa: E402
from pipeline.training.worker import train_worker  # noqa: E402
from tests.support.ranks import process_group, training_job, write_inputs  # noqa: E402
from tests.support.small_training import small_base, small_recipe, small_samples  # noqa: E402

STEPS, STOP_IN = 10, 7
# Rates at which ten steps leave a trace: the spread is the methods' own.
RATES = {"ia3": 5e-2, "vera": 5e-2, "fourierft": 0.3, "layernorm": 5e-2, "full": 5e-4}


class StoppedError(RuntimeError):
    """What a dying worker looks like from inside."""


def recipe_of(base: Path, folder: Path, stage: int, precision: str, method: str) -> Recipe:
    recipe = small_recipe(base, folder, stage, dist.get_world_size())
    train = {"precision": precision, "max_steps": STEPS, "checkpoint_every": 3, "validate_every": 2}
    train |= {"learning_rate": RATES.get(method, 5e-3)}
    name, _, ablation = method.partition("-without-")
    adapter: dict[str, Any] = {"method": name, "dropout": 0.1, "singular_values": ablation != "d"}
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=train),
            "adapter": recipe.adapter.model_copy(update=adapter),
        }
    )


def trained(recipe: Recipe, run: Path, spectra: Any, interrupt: bool) -> Path:
    if dist.get_rank() == 0:
        run.mkdir(parents=True)
        write_inputs(run, small_samples()[:40], spectra, small_samples()[40:])
    dist.barrier()
    job = training_job(recipe, run)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == STOP_IN:
            raise StoppedError
        return False

    if interrupt:
        try:
            train_worker(job, stop)
        except StoppedError:
            dist.barrier()
    train_worker(job)
    return run / "work"


def loss_of_loaded(base: Path, adapter: Path | None, precision: str) -> float:
    model = load_base(base, precision)
    if adapter:
        attach_folder(model, adapter)
    batch = collate(small_samples()[40:])
    with torch.no_grad():
        losses = label_losses(model.eval(), batch)
    return float(losses.sum() / (batch.labels_BK >= 0).sum())


def differing(first: Path, second: Path) -> list[str]:
    """Names of tensors of the two adapters that are not the same to the last bit."""
    from safetensors.torch import load_file

    (one,), (other,) = (list(folder.glob("*.safetensors")) for folder in (first, second))
    a, b = load_file(one), load_file(other)
    return sorted(a.keys() ^ b.keys()) + [name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]


def measure(folder: Path, stage: int, precision: str, methods: list[str]) -> dict[str, Any]:
    base = folder / "base"
    if dist.get_rank() == 0:
        small_base(folder)
    dist.barrier()
    from kasa import ModelWeights, compute_spectra, find_targets, observe_layers

    found: dict[str, Any] = {}
    model = load_base(base, "fp32")
    weights, targets = ModelWeights(model), find_targets(model, "all-linear")
    smallest = compute_spectra(weights, targets, 8)
    with observe_layers(model, targets) as sums, torch.no_grad():
        model(input_ids=torch.arange(1, 25)[None])
    leading = {t.name: leading_triplets(weights.weight(t), 8, t.name, sums.weighting(t.name)) for t in targets}
    for method in methods:
        spectra = leading if method == "corda" else smallest
        recipe = recipe_of(base, folder, stage, precision, method)
        whole = trained(recipe, folder / method / "whole", spectra, interrupt=False)
        resumed = trained(recipe, folder / method / "resumed", spectra, interrupt=True)
        if dist.get_rank():
            continue
        records = read_journal(whole / JOURNAL)
        found[method] = {
            "losses": [record["task_loss"] for record in records],
            "resumed": [record["task_loss"] for record in read_journal(resumed / JOURNAL)],
            "differing": differing(whole / ADAPTER, resumed / ADAPTER),
            "best": min(record["validation_loss"] for record in records if "validation_loss" in record),
            "loaded": loss_of_loaded(base, whole / ADAPTER, precision),
            **json.loads((whole / ATTACHED).read_text()),
        }
    if dist.get_rank() == 0:
        found["base"] = loss_of_loaded(base, None, precision)
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with process_group():
        result = measure(folder, int(sys.argv[2]), sys.argv[3], sys.argv[4:])
        if dist.get_rank() == 0:
            (folder / "result.json").write_text(json.dumps(result))
    os._exit(0)
