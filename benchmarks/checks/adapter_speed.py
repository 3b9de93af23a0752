"""What training with an adapter and loading one cost, beside Hugging Face PEFT's LoRA and KaSA on the same base and cores.

What is compared takes turns in one process, so that a change in the machine's speed meets all alike; a figure is the
median over the turns of the ratio within a turn.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kasa
from benchmarks.checks.interchange import random_adapter
from benchmarks.core import CannotRunError, Measurement, Setting, check
from benchmarks.texts import SEQUENCE_TOKENS, text_sets, token_rows
from kasa import KasaConfig, KasaError, ModelWeights, attach, compute_spectra, find_targets, fold, penalty
from kasa.peft_kasa import export_peft_kasa
from pipeline.config.settings import BaseSettings
from pipeline.models.base import BaseModel, find_base
from pipeline.models.loading import load_base
from pipeline.models.prompting import load_tokenizer

RANK, ALPHA = 16, 32
SINGULAR_VALUE_WEIGHT, ORTHOGONALITY_WEIGHT = 1e-4, 1e-3
EXPECTED_LAYERS = 210
BATCH = 4
STEPS, REGULARISER_TURNS, LOADS = 10, 40, 5
LEARNING_RATE = 2e-4
# How far two fp32 computations of the same regularisers may lie apart.
SAME = 1e-5


@dataclass(frozen=True)
class Arm:
    """A model in training: what its loss has beside the task's, and the optimizer of its adapter."""

    model: nn.Module
    regulariser: Callable[[], Any]
    optimizer: torch.optim.Optimizer


@check(bar=0.97, direction="at least", unit="times the tokens per second of PEFT's LoRA")
def train_step(setting: Setting) -> Measurement:
    """A training step with regularisers, all linear layers of SmolLM2-135M, r=16, against PEFT's LoRA and KaSA."""
    base = _base(setting)
    rows = token_rows(text_sets(setting.workspace)["python reference"][0], load_tokenizer(base.folder), 8192)
    batches = torch.tensor(rows).split(BATCH)
    arms = {
        "PEFT LoRA": _peft_arm(base, with_kasa=False),
        "PEFT KaSA": _peft_arm(base, with_kasa=True),
        "KaSA": _our_arm(base, folded=False),
        "KaSA, folded": _our_arm(base, folded=True),
    }
    losses: dict[str, float] = {}

    def step(name: str, turn: int) -> None:
        arm, tokens = arms[name], batches[turn % len(batches)]
        loss = arm.model(input_ids=tokens, labels=tokens, use_cache=False).loss + arm.regulariser()
        loss.backward()
        arm.optimizer.step()
        arm.optimizer.zero_grad()
        losses[name] = loss.item()

    seconds = take_turns({name: partial(step, name) for name in arms}, STEPS)
    return step_of(seconds, losses, {name: _adapted_count(arm.model) for name, arm in arms.items()})


@check(bar=5, direction="at least", unit="times as fast")
def regulariser(setting: Setting) -> Measurement:
    """Both regularisers of SmolLM2's 210 layers at r=16, forward and backward, against PEFT's `_get_kasa_loss`."""
    base = _base(setting)
    theirs, ours = _peft_arm(base, with_kasa=True).model, load_base(base.folder, "fp32")
    config = _config(truncation="none")
    layers = attach(ours, find_targets(ours, "all-linear"), config)
    with torch.no_grad():
        for name, layer in layers.items():
            module: Any = theirs.get_submodule(f"base_model.model.{name}")
            update = layer.update
            assert update is not None
            update.b.normal_()
            for our, their in (
                (update.a, module.lora_A["default"].weight),
                (update.d, module.lora_diag["default"]),
                (update.b, module.lora_B["default"].weight),
            ):
                their.copy_(our)
    values: dict[str, float] = {}

    def once(name: str, model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
        model.zero_grad()
        value = loss()
        value.backward()
        values[name] = value.item()

    seconds = take_turns(
        {
            "PEFT": lambda _: once("PEFT", theirs, theirs._get_kasa_loss),  # type: ignore[arg-type]
            "KaSA": lambda _: once("KaSA", ours, lambda: penalty(layers.values(), "paper").weighted(config)),
        },
        REGULARISER_TURNS,
    )
    return regulariser_of(seconds, values, len(layers))


@check(bar=50, direction="at least", unit="times as fast")
def adapter_load(setting: Setting) -> Measurement:
    """Loading a saved adapter of SmolLM2's 210 layers at r=16 onto the loaded base, against PEFT's reload of its KaSA."""
    from peft import PeftModel

    base = _base(setting)
    ours, theirs = setting.scratch / "adapter-load", setting.scratch / "adapter-load-peft"
    kasa.save_adapter(ours, adapter := random_adapter(base, "weight"))
    export_peft_kasa(adapter, theirs)
    plain = load_base(base.folder, "fp32")

    def load_ours(model: nn.Module) -> nn.Module:
        kasa.attach_saved(model, kasa.read_adapter(ours))
        return model

    def load_theirs(model: nn.Module) -> nn.Module:
        return PeftModel.from_pretrained(model, str(theirs))

    # One reload of PEFT's stands for all: its full SVDs take seconds, and a repetition tells nothing new.
    peft_seconds, reloaded = _seconds(load_theirs, copy.deepcopy(plain))
    our_seconds, loaded = zip(*(_seconds(load_ours, copy.deepcopy(plain)) for _ in range(LOADS)), strict=True)
    tokens = torch.arange(BATCH * SEQUENCE_TOKENS).view(BATCH, -1)
    with torch.no_grad():
        logits, peft_logits = (model(input_ids=tokens).logits for model in (loaded[-1], reloaded))
    return load_of(
        peft_seconds, list(our_seconds), float((logits - peft_logits).abs().max() / peft_logits.abs().max()), ours
    )


def take_turns(tasks: Mapping[str, Callable[[int], None]], turns: int) -> dict[str, list[float]]:
    """Seconds of every task in every turn, by name; a first turn is not counted, and the order changes from turn to turn."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks)
    for turn in range(turns + 1):
        for name in order:
            took, _ = _seconds(tasks[name], turn)
            if turn:
                seconds[name].append(took)
        # Forwards and backwards in turn, each time from another one: no task always follows the same one.
        order = order[::-1] if turn % 2 else order[::-1][1:] + order[::-1][:1]
    return seconds


def speed(seconds: Mapping[str, list[float]], name: str, other: str) -> float:
    """How many times as fast as `other` a task is."""
    return statistics.median(theirs / ours for ours, theirs in zip(seconds[name], seconds[other], strict=True))


def step_of(seconds: Mapping[str, list[float]], losses: Mapping[str, float], layers: Mapping[str, int]) -> Measurement:
    """Our tokens per second over those of PEFT's LoRA; slower than PEFT's KaSA, or fewer layers adapted, is a flaw."""
    against_kasa = speed(seconds, "KaSA", "PEFT KaSA")
    flaws = [f"{against_kasa:.3f} times as fast as PEFT's KaSA"] if against_kasa <= 1 else []
    flaws += [f"{name} adapts {n} layers, not {EXPECTED_LAYERS}" for name, n in layers.items() if n != EXPECTED_LAYERS]
    tokens = BATCH * SEQUENCE_TOKENS
    details = {
        "rank": RANK,
        "tokens_per_step": tokens,
        "threads": torch.get_num_threads(),
        "tokens_per_second": {name: tokens / statistics.median(seconds[name]) for name in seconds},
        "against_peft_lora": {name: speed(seconds, name, "PEFT LoRA") for name in seconds},
        "against_peft_kasa": {name: speed(seconds, name, "PEFT KaSA") for name in seconds},
        "seconds": {name: [round(took, 4) for took in seconds[name]] for name in seconds},
        "last_loss": dict(losses),
    }
    return Measurement(speed(seconds, "KaSA", "PEFT LoRA"), details, flaws=tuple(flaws))


def regulariser_of(seconds: Mapping[str, list[float]], values: Mapping[str, float], layers: int) -> Measurement:
    """Our speed over PEFT's; another value from the same tensors, or another number of layers, is a flaw."""
    apart = abs(values["KaSA"] - values["PEFT"]) / abs(values["PEFT"])
    flaws = [f"the values lie {apart:.1e} apart"] if apart > SAME else []
    flaws += [f"{layers} layers, not {EXPECTED_LAYERS}"] if layers != EXPECTED_LAYERS else []
    details = {
        "rank": RANK,
        "layers": layers,
        "threads": torch.get_num_threads(),
        "milliseconds": {name: 1000 * statistics.median(seconds[name]) for name in seconds},
        "values_apart": apart,
    }
    return Measurement(speed(seconds, "KaSA", "PEFT"), details, flaws=tuple(flaws))


def load_of(peft_seconds: float, seconds: list[float], logits_apart: float, folder: Path) -> Measurement:
    """Our speed over PEFT's, by our slowest load but for the first; two models that differ are a flaw."""
    files = [file for file in folder.iterdir() if file.is_file()]
    read_seconds, _ = _seconds(lambda: [file.read_bytes() for file in files])
    details = {
        "peft_seconds": peft_seconds,
        "seconds": seconds,
        "reading_the_files_alone_seconds": read_seconds,
        "mebibytes": sum(file.stat().st_size for file in files) / 2**20,
        "logits_apart": logits_apart,
        "threads": torch.get_num_threads(),
    }
    # The paper's rule, which alone PEFT knows, takes SmolLM2 apart and amplifies rounding (docs/decisions.md).
    flaws = () if logits_apart <= 1e-2 else (f"the logits lie {logits_apart:.1e} apart",)
    return Measurement(peft_seconds / statistics.median(seconds), details, flaws=flaws)


def _our_arm(base: BaseModel, folded: bool) -> Arm:
    model, config = load_base(base.folder, "fp32"), _config(truncation="weight")
    targets = find_targets(model, "all-linear")
    layers = attach(model, targets, config, compute_spectra(ModelWeights(model), targets, RANK))
    if folded:
        fold(model)
    return _arm(model, lambda: penalty(layers.values(), config.regulariser).weighted(config))


def _peft_arm(base: BaseModel, with_kasa: bool) -> Arm:
    from peft import KasaConfig as PeftKasaConfig
    from peft import LoraConfig, get_peft_model

    weights = PeftKasaConfig(beta=SINGULAR_VALUE_WEIGHT, gamma=ORTHOGONALITY_WEIGHT) if with_kasa else None
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", kasa_config=weights)
    model: Any = get_peft_model(load_base(base.folder, "fp32"), config)
    return _arm(model, model._get_kasa_loss)


def _arm(model: nn.Module, regulariser: Callable[[], Any]) -> Arm:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Arm(model.train(), regulariser, torch.optim.AdamW(trained, lr=LEARNING_RATE))


def _adapted_count(model: nn.Module) -> int:
    """How many layers have a trained B."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return sum(name.endswith((".b", ".lora_B.default.weight")) for name in names)


def _config(truncation: Any) -> KasaConfig:
    return KasaConfig(
        rank=RANK,
        alpha=float(ALPHA),
        truncation=truncation,
        dropped_rank=RANK,
        singular_value_weight=SINGULAR_VALUE_WEIGHT,
        orthogonality_weight=ORTHOGONALITY_WEIGHT,
    )


def _seconds(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def _base(setting: Setting) -> BaseModel:
    try:
        import peft  # noqa: F401  (a development dependency)

        base = find_base(BaseSettings(), setting.workspace)
    except (KasaError, ImportError) as error:
        raise CannotRunError(str(error)) from None
    assert base is not None
    return base
