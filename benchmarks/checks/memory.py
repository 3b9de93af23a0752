"""What training holds in memory and on disk: `kasa plan` against real workers, ZeRO-3's share, and a checkpoint's size.

As a program (`python -m benchmarks.checks.memory plan CASE FOLDER BASE`, or `held FOLDER`) it is one rank of a training.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open
from torch import nn

from benchmarks.core import Measurement, Setting, check
from benchmarks.inputs import base_of
from benchmarks.timing import kasa_command
from kasa import KasaConfig, adapted_layers, attach, find_targets, penalty
from pipeline.apps.plan import DataFacts, Estimate, checked_targets, estimate
from pipeline.apps.plan_memory import GIB
from pipeline.config.deepspeed import with_accumulation
from pipeline.config.recipe import Recipe, parse_recipe
from pipeline.models.loading import DTYPES
from pipeline.training import worker, zero
from tests.support.ranks import (
    count_bytes,
    process_group,
    shape_of,
    stand_in_spectra,
    start_ranks,
    training_job,
    write_inputs,
)
from tests.support.small_training import RANK as TRUNCATION_RANK
from tests.support.small_training import outcome, prepare_run, train_run, write_recipe

# Where this module is found when it is run as a program.
_MODULE = "benchmarks.checks.memory"
LLAMAS = (
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-hf",
    "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3-70B",
)
ANSWER_S = 10.0
ROW_TOKENS, MICRO_BATCH = 256, 2
# The first step of stage 3 only records the order of modules; from the second on weights are gathered ahead.
STEPS = 3
# glibc keeps what is freed in gaps between what is not, and hands little of it back. With every larger tensor in a mapping
# of its own, what is resident is what is in use, as `torch.cuda.max_memory_allocated` tells it for a GPU.
RETURN_WHAT_IS_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """One training run of SmolLM2 with every linear layer adapted, rank 8."""

    stage: int
    workers: int
    precision: str
    checkpointing: bool = False
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """As it appears in the record."""
        extras = (" checkpointing" if self.checkpointing else "") + (" dropout" if self.dropout else "")
        return f"ZeRO-{self.stage}, {self.workers} workers, {self.precision}{extras}"

    def recipe(self, base: Path) -> Recipe:
        """The recipe of the run."""
        return parse_recipe(
            {
                "name": "plan",
                "base": {"model": str(base)},
                "data": {"train": "rows.jsonl", "max_tokens": ROW_TOKENS},
                "adapter": {"dropout": self.dropout},
                "train": {
                    "workers": self.workers,
                    "deepspeed": f"cpu_zero{self.stage}",
                    "precision": self.precision,
                    "epochs": STEPS,
                    "batch_size": self.workers * MICRO_BATCH,
                    "micro_batch_size": MICRO_BATCH,
                    "gradient_checkpointing": self.checkpointing,
                },
            },
            self.name,
        )


CASES = (
    *(Case(stage, workers, "fp32") for workers in (1, 2) for stage in (0, 1, 3)),
    *(Case(stage, workers, "bf16") for workers in (1, 2) for stage in (1, 3)),
    Case(1, 1, "fp32", checkpointing=True),
    Case(1, 1, "bf16", dropout=0.1),
)


@check(bar=15, direction="at most", unit="%")
def plan(setting: Setting) -> Measurement:
    """Memory in use by a worker as planned against measured, without the process itself; worst of 12 runs of SmolLM2."""
    base = base_of(setting.workspace).folder
    runs = {case.name: compare(case, base, setting.scratch) for case in CASES}
    seconds = {model: seconds_to_answer(model, setting.scratch) for model in LLAMAS}
    slow = [f"{model} took {taken:.1f} s" for model, taken in seconds.items() if taken >= ANSWER_S]
    worst = max(abs(run["deviation"]) for run in runs.values())
    return Measurement(100 * worst, {"runs": runs, "seconds_to_answer": seconds}, flaws=tuple(slow))


@check(bar=3.1, direction="at most", unit="times the adapter's fp32 bytes")
def checkpoint_size(setting: Setting) -> Measurement:
    """A training checkpoint of SmolLM2-135M, all linear layers, r=16: all files, none of them pickle."""
    recipe, run = _prepared(setting, "checkpoint-size", stage=2, workers=1)
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
    recipe, run = _prepared(setting, "zero3-memory", stage=3, workers=2)
    write_recipe(recipe, run)
    start_ranks(_MODULE, ["held", str(run)], 2, run).wait()
    found = [json.loads((run / f"held-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    return Measurement(100 * max(one["base"] / one["whole_base"] for one in found), {"ranks": found})


def compare(case: Case, base: Path, scratch: Path) -> dict[str, Any]:
    """Planned and measured GiB of rank 0.

    `in_use`: the peak of the training steps where freed memory is returned, less `process`; `deviation` is the plan's
    from it. `resident`: the same with glibc as it is, gaps included; `resident_deviation` is that of the whole, process
    included. `loading`: the peak until DeepSpeed has started, less `process`.
    """
    recipe = case.recipe(base)
    planned = planned_estimate(recipe)
    assert planned.memory is not None
    kinds = {item.kind: item.gib for item in planned.memory.items}
    expected = planned.memory.device_gib - kinds["process"]
    exact = run_workers(case, base, scratch, RETURN_WHAT_IS_FREED)
    plain = run_workers(case, base, scratch, {})
    in_use, resident = exact["peak"] - exact["process"], plain["peak"] - plain["process"]
    found = {
        "planned": {kind: round(gib, 4) for kind, gib in kinds.items()},
        "process": exact["process"],
        "loading": exact["loading"] - exact["process"],
        "in_use": in_use,
        "deviation": expected / in_use - 1,
        "resident": resident,
        "resident_deviation": planned.memory.device_gib / plain["peak"] - 1,
    }
    print(
        f"  {case.name}: planned {expected:.2f}, in use {in_use:.2f} GiB ({found['deviation']:+.1%}); resident with "
        f"glibc's gaps {resident:.2f}",
        file=sys.stderr,
        flush=True,
    )
    return found


def planned_estimate(recipe: Recipe) -> Estimate:
    """The plan of a run whose rows are all of about the full length."""
    facts = DataFacts(recipe.train.batch_size, ROW_TOKENS, ROW_TOKENS)
    return estimate(recipe, shape_of(recipe), checked_targets(recipe, shape_of(recipe)), data=facts)


def run_workers(case: Case, base: Path, scratch: Path, environment: dict[str, str]) -> dict[str, float]:
    """Train in processes of their own; what rank 0 measured, in GiB."""
    folder = scratch / f"plan-{time.monotonic_ns()}"
    _write_inputs(case.recipe(base), folder)
    arguments = ["plan", str(CASES.index(case)), str(folder), str(base)]
    start_ranks(_MODULE, arguments, case.workers, folder, environment).wait()
    result = folder / "measured.json"
    return json.loads(result.read_text(encoding="utf-8"))


def seconds_to_answer(model: str, scratch: Path) -> float:
    """Seconds of `kasa plan` for a model of which nothing is on this machine."""
    recipe = scratch / "llama.yaml"
    values = {
        "name": "llama",
        "base": {"model": model},
        "data": {"train": "rows.jsonl", "train_rows": 10_000},
        "train": {"batch_size": 64, "micro_batch_size": 1},
    }
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    answer, seconds = kasa_command("plan", str(recipe), "--gpus", "8", "--gpu", "H100")
    if not answer["stages"]:
        raise RuntimeError(f"no answer for {model}")
    return seconds


def _write_inputs(recipe: Recipe, folder: Path) -> None:
    """One global batch, no two rows of one length."""
    rows = [[7 + token % 1000 for token in range(ROW_TOKENS - row)] for row in range(recipe.train.batch_size)]
    targets = checked_targets(recipe, shape_of(recipe))
    write_inputs(
        folder, [{"input_ids": ids, "labels": ids} for ids in rows], stand_in_spectra(targets, recipe.spectra_rank)
    )


def measure_worker(case: Case, folder: Path, base: Path) -> None:
    """One rank: the pipeline's own training, with the resident memory of its phases."""
    recipe = case.recipe(base)
    job = training_job(recipe, folder)
    toy = job.deepspeed | {"zero_optimization": {"stage": min(case.stage, 2)}}
    _train_toy(case, zero.start_engine, with_accumulation(toy, case.workers, 1))
    measured = {"process": _resident_gib("VmRSS")}
    _forget_peak()

    start_engine = zero.start_engine

    def start_and_mark(*arguments: Any, **settings: Any) -> Any:
        engine = start_engine(*arguments, **settings)
        measured["loading"] = _resident_gib("VmHWM")
        _forget_peak()
        return engine

    with mock.patch.object(zero, "start_engine", start_and_mark):
        worker.train_worker(job)
    measured["peak"] = _resident_gib("VmHWM")
    if dist.get_rank() == 0:
        (folder / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


def _train_toy(case: Case, start_engine: Callable[..., Any], deepspeed: dict[str, Any]) -> None:
    """Two steps of a tiny model, so that whatever is loaded at first use belongs to the process.

    Never at stage 3, which would leave its marks on torch for the real run.
    """
    import datasets  # noqa: F401  the worker imports it too
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    model.to(DTYPES[case.precision])
    kasa = KasaConfig(truncation="none")
    attach(model, find_targets(model, "all-linear"), kasa)
    engine = start_engine(model, deepspeed, 0.0, timeout_s=60)
    tokens_BT = torch.randint(0, 64, (MICRO_BATCH, 32))
    for _ in range(2):
        loss = engine(input_ids=tokens_BT, labels=tokens_BT).loss
        engine.backward(loss + penalty(adapted_layers(engine.module).values(), "authors").weighted(kasa))
        engine.step()
    engine.destroy()
    del engine, model, loss
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident_gib(field: str) -> float:
    """`VmRSS`, what is resident now, or `VmHWM`, the most there was since `_forget_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / GIB
    raise RuntimeError(f"this system does not tell {field}")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


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


def _prepared(setting: Setting, name: str, stage: int, workers: int) -> tuple[Recipe, Path]:
    """Two steps of SmolLM2, r=16, with a checkpoint in between: the recipe, and its inputs in a folder."""
    recipe = parse_recipe(
        {
            "name": "smollm",
            "base": {"model": str(base_of(setting.workspace).folder)},
            "data": {"train": "rows.jsonl", "max_tokens": 64},
            "adapter": {"rank": 16, "truncation_rank": TRUNCATION_RANK, "truncation": "weight"},
            "train": {
                "workers": workers, "deepspeed": f"cpu_zero{stage}", "precision": "fp32", "max_steps": 2,
                "batch_size": 4, "micro_batch_size": 2, "checkpoint_every": 1,
            },
        },
        "smollm",
    )  # fmt: skip
    spectra = stand_in_spectra(checked_targets(recipe, shape_of(recipe)), TRUNCATION_RANK)
    return recipe, prepare_run(setting.scratch / name, spectra)


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
    if sys.argv[1] == "held":
        measure_held(Path(sys.argv[2]))
    else:
        with process_group():
            measure_worker(CASES[int(sys.argv[2])], Path(sys.argv[3]), Path(sys.argv[4]))
