"""One rank of `test_zero.py`, run as a process of its own: ZeRO-3 patches torch for the whole process.

usage: python -m tests.pipeline.training.zero_script RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM  # noqa: E402

from kasa import KasaConfig, adapted_layers, attach, find_targets, penalty  # noqa: E402
from kasa.adapter import trainable_parameters  # noqa: E402
from kasa.spectra import bottom_triplets  # noqa: E402
from kasa.targets import is_within  # noqa: E402
from pipeline.config.deepspeed import with_accumulation  # noqa: E402
from pipeline.methods.method import Adapted  # noqa: E402
from pipeline.models.prompting import Head  # noqa: E402
from pipeline.training import zero  # noqa: E402
from pipeline.training.job import BatchPlan  # noqa: E402
from pipeline.training.step import (  # noqa: E402
    LabelObjective,
    Objective,
    TokenObjective,
    optimizer_step,
)
from tests.support.ranks import process_group  # noqa: E402

STEPS, HALF, BATCH, MICRO = 6, 3, 8, 2
CONFIG = KasaConfig(
    rank=4, alpha=8.0, truncation="loss", dropped_rank=4, singular_value_weight=1e-2, orthogonality_weight=1e-2
)
RATES = [2e-3, 1e-2, 8e-3, 6e-3, 4e-3, 2e-3]
WEIGHT_DECAY, CLIPPING, HEAD_FASTER = 0.1, 1.0, 3


@dataclass(frozen=True)
class Task:
    """What is trained: samples, their loss, and the modules trained whole, `HEAD_FASTER` times as fast as the adapter."""

    samples: list[dict[str, Any]]
    objective: Objective
    head: tuple[str, ...]


def build_model(task: Task, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A tiny LLaMA, or a BERT with a head, with a KaSA layer at every linear module, the same in every process."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
        "initializer_range": 0.2,
    }  # fmt: skip
    model: Any
    if task.head:
        model = BertForSequenceClassification(
            BertConfig(**sizes, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
    targets = find_targets(model, "all-linear", task.head)
    spectra = {t.name: bottom_triplets(model.get_submodule(t.name).weight, 4) for t in targets}
    attach(model.to(dtype), targets, CONFIG, spectra, trained_modules=task.head)
    return model.train()


def build_samples() -> list[dict[str, list[int]]]:
    """Samples of unlike length and unlike numbers of labels."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index in range(20):
        ids = torch.randint(1, 64, (6 + index % 7,), generator=generator).tolist()
        prompt = 2 + index % 3
        samples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return samples


TOKENS = Task(build_samples(), TokenObjective(64), ())
LABELS = Task(
    [{"input_ids": sample["input_ids"], "label": float(index % 3)} for index, sample in enumerate(build_samples())],
    LabelObjective(Head("classification", ("a", "b", "c")), 0, 1.1),
    ("classifier",),
)


def batch_plan(task: Task, workers: int, pack_tokens: int | None) -> BatchPlan:
    lengths = [len(sample["input_ids"]) for sample in task.samples]
    labels = [task.objective.count(sample) for sample in task.samples]
    return BatchPlan(lengths, labels, STEPS, BATCH, MICRO, workers, 0, pack_tokens)


def plain_losses(task: Task) -> list[float]:
    """The same training with nothing but torch, in one process."""
    model, objective = build_model(task), task.objective
    named = trainable_parameters(model)
    parameters, head = list(named.values()), {name for name in named if is_within(name, task.head)}
    groups = [[p for name, p in named.items() if (name in head) == is_head] for is_head in (False, True)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(STEPS):
        samples = [task.samples[index] for index in batch_plan(task, 1, None).samples(step)]
        labels = sum(map(objective.count, samples))
        for group, faster in zip(optimizer.param_groups, (1, HEAD_FASTER), strict=True):
            group["lr"] = faster * RATES[step]
        task_loss = (
            sum(objective.losses(model, objective.batch([sample], packed=False)).sum() for sample in samples) / labels
        )
        loss = task_loss + penalty(adapted_layers(model).values(), CONFIG.regulariser).weighted(CONFIG)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIPPING)
        optimizer.step()
        losses.append(loss.item())
    return losses


def deepspeed_config(stage: int, dtype: torch.dtype, persistence: int, passes: int) -> dict[str, Any]:
    config = {
        "gradient_clipping": CLIPPING,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": persistence, "overlap_comm": False},
        "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    return with_accumulation(config, dist.get_world_size(), passes)


def start(
    task: Task, stage: int, dtype: torch.dtype, persistence: int, passes: int
) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    config = deepspeed_config(stage, dtype, persistence, passes)
    model = build_model(task, dtype)
    head = [parameter for name, parameter in trainable_parameters(model).items() if is_within(name, task.head)]
    engine = zero.start_engine(model, config, WEIGHT_DECAY, 60, head)
    return engine, trainable_parameters(engine.module)


def train(task: Task, engine: Any, steps: range, plan: BatchPlan) -> list[float]:
    """The pipeline's own optimizer step."""
    layers = adapted_layers(engine.module).values()

    def penalties() -> dict[str, torch.Tensor]:
        return {"both": penalty(layers, CONFIG.regulariser).weighted(CONFIG)}

    adapted = Adapted(trainable_parameters(engine.module), lambda folder, values: None, penalties)
    losses = []
    for step in steps:
        zero.set_learning_rate(engine, RATES[step], HEAD_FASTER * RATES[step])
        losses.append(optimizer_step(adapted, engine, plan, task.samples, step, task.objective)["loss"])
    return losses


def snapshot(engine: Any, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return zero.whole_parameters(engine, parameters) | zero.whole_moments(engine, parameters)


def compare_resumed(
    stage: int, dtype: torch.dtype, persistence: int = 0, pack_tokens: int | None = None, task: Task = TOKENS
) -> dict[str, Any]:
    """Six steps undisturbed, and three with three more in a new engine."""
    plan = batch_plan(task, dist.get_world_size(), pack_tokens)
    engine, parameters = start(task, stage, dtype, persistence, plan.accumulation_steps)
    undisturbed = train(task, engine, range(HALF), plan)
    values, moments = zero.whole_parameters(engine, parameters), zero.whole_moments(engine, parameters)
    undisturbed += train(task, engine, range(HALF, STEPS), plan)
    end = snapshot(engine, parameters)
    engine.destroy()

    engine, parameters = start(task, stage, dtype, persistence, plan.accumulation_steps)
    zero.restore_state(engine, parameters, values, moments, HALF)
    restored = snapshot(engine, parameters)
    resumed = train(task, engine, range(HALF, STEPS), plan)
    resumed_end = snapshot(engine, parameters)
    engine.destroy()
    saved = values | moments
    return {
        "losses": undisturbed,
        "resumed": resumed,
        "partitioned": stage == 3 and any(p.numel() == 0 for p in parameters.values()),
        "passes": plan.accumulation_steps,
        "moved": sum(not torch.equal(values[name], end[name]) for name in values),
        "parameters": len(values),
        "restored_differs": [name for name in saved if not torch.equal(saved[name], restored[name])],
        "end_differs": [name for name in end if not torch.equal(end[name], resumed_end[name])],
    }


def measure() -> dict[str, Any]:
    """Every case at this number of processes."""
    found: dict[str, Any] = {"plain": plain_losses(TOKENS), "plain head": plain_losses(LABELS)}
    # Stage 3 last: it leaves its marks on torch.
    found["2 fp32 packed"] = compare_resumed(2, torch.float32, pack_tokens=30)
    for stage in (0, 1, 2, 3):
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            if (stage, name) != (0, "bf16"):
                found[f"{stage} {name}"] = compare_resumed(stage, dtype)
                if f"{stage} {name}" in ("0 fp32", "2 fp32", "3 fp32", "3 bf16"):
                    found[f"{stage} {name} head"] = compare_resumed(stage, dtype, task=LABELS)
    found["3 fp32 packed"] = compare_resumed(3, torch.float32, pack_tokens=30)
    found["3 fp32 persistent"] = compare_resumed(3, torch.float32, persistence=150)
    return found


if __name__ == "__main__":
    with process_group():
        result = measure()
        if dist.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(result), encoding="utf-8")
    os._exit(0)
