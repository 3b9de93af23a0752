"""DeepSpeed ZeRO against plain torch, across changes of the number of workers, and what it holds and saves."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.nn import functional

from benchmarks.core import CannotRunError, Measurement, Setting, check
from kasa import KasaConfig, KasaError, attach, find_targets
from kasa.adapter import trainable_parameters
from kasa.spectra import Triplets
from pipeline.apps.planning.plan import checked_targets
from pipeline.config.recipe import Recipe, parse_recipe
from pipeline.config.settings import BaseSettings
from pipeline.core.journal import Record
from pipeline.models.base import find_base
from pipeline.models.loading import load_base
from pipeline.training import worker, zero
from pipeline.training.batches import BatchPlan, learning_rate
from tests.support.ranks import (
    count_bytes,
    process_group,
    shape_of,
    stand_in_spectra,
    start_ranks,
    training_job,
)
from tests.support.small_training import (
    BATCH,
    RANK,
    STEPS,
    Sample,
    outcome,
    prepare_run,
    small_base,
    small_recipe,
    small_samples,
    train_run,
    write_recipe,
)

WORLDS = (1, 2)
KILLED_AFTER = (10, 19)


@check(bar=1e-5, direction="at most", unit="nats")
def zero_parity(setting: Setting) -> Measurement:
    """Loss of 30 fp32 steps of a small LLaMA at ZeRO 0 to 3 on 1 and 2 workers, against plain torch with textbook terms."""
    folder = setting.scratch / "zero-parity"
    base, spectra = small_base(folder)
    reference, adapter = _reference(small_recipe(base, folder, 0, 1), spectra)
    found: dict[str, Any] = {}
    for stage in range(4):
        for workers in WORLDS:
            recipe = small_recipe(base, folder, stage, workers)
            run = prepare_run(folder / f"zero-{stage}-{workers}", spectra)
            train_run(recipe, run)
            records, values = outcome(run)
            found[f"ZeRO-{stage}, {workers} workers"] = {
                "loss": _apart(records, reference, "loss"),
                # DeepSpeed does not tell it at stage 0.
                **({"gradient_norm": _apart(records, reference, "gradient_norm")} if stage else {}),
                "adapter": max(float((values[name] - adapter[name]).abs().max()) for name in adapter),
            }
    first, last = reference[0]["loss"], reference[-1]["loss"]
    flaws = () if last < first - 0.1 else (f"the reference's loss went from {first:.3f} to {last:.3f} only",)
    worst = max(one["loss"] for one in found.values())
    return Measurement(worst, {"runs": found, "reference": [record["loss"] for record in reference]}, flaws=flaws)


@check(bar=1e-5, direction="at most", unit="nats")
def elastic_resume(setting: Setting) -> Measurement:
    """Loss of a run killed twice and resumed on 2, 1, 2 workers, against undisturbed: 30 fp32 steps, ZeRO 2 and 3."""
    folder = setting.scratch / "elastic"
    base, spectra = small_base(folder)
    found: dict[str, dict[str, Any]] = {}
    for stage in (2, 3):
        undisturbed = prepare_run(folder / f"undisturbed-{stage}", spectra)
        train_run(small_recipe(base, folder, stage, 2), undisturbed)
        run = folder / f"elastic-{stage}"
        prepare_run(run, spectra)
        starts = []
        for workers, until in ((2, KILLED_AFTER[0]), (1, KILLED_AFTER[1]), (2, None)):
            starts.append(train_run(small_recipe(base, folder, stage, workers), run, until))
        (records, values), (expected, whole) = outcome(run), outcome(undisturbed)
        found[f"ZeRO-{stage}"] = {
            "loss": _apart(records, expected, "loss"),
            "adapter": max(float((values[name] - whole[name]).abs().max()) for name in whole),
            "resumed_after_step": starts[1:],
        }
    flaws = [
        f"{name} did not resume from a checkpoint" for name, one in found.items() if not all(one["resumed_after_step"])
    ]
    return Measurement(max(one["loss"] for one in found.values()), found, flaws=tuple(flaws))


@check(bar=3.1, direction="at most", unit="times the adapter's fp32 bytes")
def checkpoint_size(setting: Setting) -> Measurement:
    """A training checkpoint of SmolLM2-135M, all linear layers, r=16: all files, none of them pickle."""
    run = setting.scratch / "checkpoint-size"
    recipe = _smollm(setting, stage=2, workers=1)
    prepare_run(run, stand_in_spectra(checked_targets(recipe, shape_of(recipe)), RANK))
    train_run(recipe, run)
    (checkpoint,) = (run / "work" / "checkpoints").iterdir()
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    _, values = outcome(run)
    adapter = sum(value.numel() * 4 for value in values.values())
    details = {"files": {path.name: path.stat().st_size for path in files}, "adapter_bytes": adapter}
    strangers = [path.name for path in files if not _is_json(path) and not _is_safetensors(path)]
    flaws = [f"{name} is neither JSON nor safetensors" for name in strangers]
    return Measurement(sum(path.stat().st_size for path in files) / adapter, details, flaws=tuple(flaws))


@check(bar=55, direction="at most", unit="% of the base's bytes")
def zero3_memory(setting: Setting) -> Measurement:
    """What a rank holds of SmolLM2's frozen parameters after training at ZeRO-3 on two workers; the larger of both."""
    run = setting.scratch / "zero3-memory"
    recipe = _smollm(setting, stage=3, workers=2)
    prepare_run(run, stand_in_spectra(checked_targets(recipe, shape_of(recipe)), RANK))
    write_recipe(recipe, run)
    start_ranks("benchmarks.checks.zero_training", [str(run)], 2, run).wait()
    found = [json.loads((run / f"held-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    return Measurement(100 * max(one["base"] / one["whole_base"] for one in found), {"ranks": found})


def measure_held(folder: Path) -> None:
    """One rank: train, then write what it holds of base and dropped factors, in bytes of distinct storages."""
    engines = []
    start_engine = zero.start_engine

    def start_and_keep(*arguments: Any) -> Any:
        engines.append(start_engine(*arguments))
        return engines[0]

    recipe = parse_recipe(json.loads((folder / "recipe.json").read_text(encoding="utf-8")), str(folder))
    with process_group(), mock.patch.object(zero, "start_engine", start_and_keep):
        worker.train_worker(training_job(recipe, folder))
        parameters = dict(engines[0].module.named_parameters())
        dropped = {name: parameter for name, parameter in parameters.items() if ".dropped_" in name}
        base = {n: p for n, p in parameters.items() if not p.requires_grad and n not in dropped}
        held = {
            "base": count_bytes([part for parameter in base.values() for part in _parts(parameter)]),
            "whole_base": sum(parameter.ds_numel * parameter.element_size() for parameter in base.values()),
            "dropped": count_bytes([part for parameter in dropped.values() for part in _parts(parameter)]),
            "whole_dropped": sum(parameter.ds_numel * parameter.element_size() for parameter in dropped.values()),
        }
        (folder / f"held-{dist.get_rank()}.json").write_text(json.dumps(held), encoding="utf-8")


def _parts(parameter: Any) -> list[torch.Tensor]:
    """The rank's own part of a partitioned parameter, and whatever of the whole is in memory."""
    return [parameter.ds_tensor, parameter.data] if parameter.data.numel() else [parameter.ds_tensor]


def _smollm(setting: Setting, stage: int, workers: int) -> Recipe:
    """Two steps of SmolLM2, r=16, with a checkpoint in between."""
    try:
        base = find_base(BaseSettings(), setting.workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None
    assert base is not None
    return parse_recipe(
        {
            "name": "smollm",
            "base": {"model": str(base.folder)},
            "data": {"train": "rows.jsonl", "max_tokens": 64},
            "adapter": {"rank": 16, "truncation_rank": RANK, "truncation": "weight"},
            "train": {
                "workers": workers, "deepspeed": f"cpu_zero{stage}", "precision": "fp32", "max_steps": 2,
                "batch_size": 4, "micro_batch_size": 2, "checkpoint_every": 1,
            },
        },
        "smollm",
    )  # fmt: skip


def _apart(records: Sequence[Record], expected: Sequence[Record], name: str) -> float:
    """The largest difference over all steps; each has to be there once, in order."""
    if [record["step"] for record in records] != [record["step"] for record in expected]:
        raise RuntimeError(f"steps {[record['step'] for record in records]} were recorded")
    pairs = [(one[name], other[name]) for one, other in zip(records, expected, strict=True) if name in one]
    return max((abs(one - other) for one, other in pairs))


class _PlainLayer(nn.Module):
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


def _reference(recipe: Recipe, spectra: Mapping[str, Triplets]) -> tuple[list[Record], dict[str, torch.Tensor]]:
    """The same training with torch alone: one process, one sample after another."""
    settings, config, samples = recipe.train, recipe.kasa_config, small_samples()
    base = Path(recipe.base.model)
    started = load_base(base, "fp32")
    attach(started, find_targets(started, "all-linear"), config, spectra, settings.seed)
    model = load_base(base, "fp32").train().requires_grad_(False)
    layers = _plain_layers(model, config, spectra, trainable_parameters(started))
    parameters = [parameter for layer in layers.values() for parameter in (layer.a, layer.d, layer.b)]
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay)
    order = BatchPlan([len(s["input_ids"]) for s in samples], STEPS, BATCH, settings.micro_batch_size, 1, settings.seed)
    records = []
    for step in range(STEPS):
        rate = learning_rate(step, STEPS, settings.learning_rate, settings.warmup_share, settings.schedule)
        optimizer.param_groups[0]["lr"] = rate
        chosen = [samples[int(index)] for index in order.samples(step)]
        labels = sum(label >= 0 for sample in chosen for label in sample["labels"][1:])
        task = sum(_loss_sum(model, sample) for sample in chosen) / labels
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


def _plain_layers(
    model: nn.Module, config: KasaConfig, spectra: Mapping[str, Triplets], start: Mapping[str, torch.Tensor]
) -> dict[str, _PlainLayer]:
    layers = {}
    for target in find_targets(model, "all-linear"):
        left_OD, right_DI = spectra[target.name].dropped_factors(config.dropped_rank)
        tensors = {part: start[f"{target.name}.{part}"] for part in "adb"}
        linear: Any = model.get_submodule(target.name)
        layers[target.name] = _PlainLayer(linear, left_OD @ right_DI, tensors, config.scale)
        model.set_submodule(target.name, layers[target.name])
    return layers


def _loss_sum(model: nn.Module, sample: Sample) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1]
    return functional.cross_entropy(logits, torch.tensor(sample["labels"][1:]), reduction="sum")


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _is_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except Exception:  # whatever it says of a file that is none
        return False


if __name__ == "__main__":
    measure_held(Path(sys.argv[1]))
