"""One rank of `test_zero.py`, run as a process of its own: ZeRO-3 patches torch for the whole process.

usage: python zero_script.py RANK WORLD STORE_FILE RESULT.json
"""

from __future__ import annotations

import json
import sys
import warnings
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from kasa import KasaConfig, adapted_layers, attach, find_targets, penalty  # noqa: E402
from kasa.adapter import trainable_parameters  # noqa: E402
from kasa.spectra import bottom_triplets  # noqa: E402
from pipeline.deepspeed_config import with_passes  # noqa: E402
from pipeline.language_model import collate, label_losses  # noqa: E402
from pipeline.training import zero  # noqa: E402
from pipeline.training.batches import BatchPlan  # noqa: E402
from pipeline.training.worker import _optimizer_step  # noqa: E402

STEPS, HALF, BATCH, MICRO = 6, 3, 8, 2
CONFIG = KasaConfig(rank=4, alpha=8.0, dropped_rank=4, singular_value_weight=1e-2, orthogonality_weight=1e-2)
RATES = [2e-3, 1e-2, 8e-3, 6e-3, 4e-3, 2e-3]
WEIGHT_DECAY, CLIPPING = 0.1, 1.0


def build_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A tiny LLaMA with a KaSA layer at every linear module, the same in every process."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, initializer_range=0.2,
        )
    )  # fmt: skip
    targets = find_targets(model, "all-linear")
    spectra = {t.name: bottom_triplets(model.get_submodule(t.name).weight, 4) for t in targets}
    attach(model.to(dtype), targets, CONFIG, spectra)
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


SAMPLES = build_samples()


def batch_plan(workers: int, pack_tokens: int | None) -> BatchPlan:
    lengths = [len(sample["input_ids"]) for sample in SAMPLES]
    return BatchPlan(lengths, STEPS, BATCH, MICRO, workers, 0, pack_tokens)


def plain_losses() -> list[float]:
    """The same training with nothing but torch, in one process."""
    model = build_model()
    parameters = list(trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(STEPS):
        samples = [SAMPLES[index] for index in batch_plan(1, None).samples(step)]
        labels = sum(label >= 0 for sample in samples for label in sample["labels"][1:])
        optimizer.param_groups[0]["lr"] = RATES[step]
        task = sum(label_losses(model, collate([sample])).sum() for sample in samples) / labels
        loss = task + penalty(adapted_layers(model).values(), CONFIG.regulariser).weighted(CONFIG)
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
    return with_passes(config, dist.get_world_size(), passes)


def start(stage: int, dtype: torch.dtype, persistence: int, passes: int) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    config = deepspeed_config(stage, dtype, persistence, passes)
    engine = zero.start_engine(build_model(dtype), config, WEIGHT_DECAY, timeout_s=60)
    return engine, trainable_parameters(engine.module)


def train(engine: Any, steps: range, plan: BatchPlan) -> list[float]:
    """The pipeline's own optimizer step."""
    job: Any = SimpleNamespace(config=CONFIG, settings=SimpleNamespace(seed=0))
    losses = []
    for step in steps:
        zero.set_learning_rate(engine, RATES[step])
        losses.append(_optimizer_step(job, engine, plan, SAMPLES, step)["loss"])
    return losses


def snapshot(engine: Any, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return zero.whole_parameters(engine, parameters) | zero.whole_moments(engine, parameters)


def compare_resumed(
    stage: int, dtype: torch.dtype, persistence: int = 0, pack_tokens: int | None = None
) -> dict[str, Any]:
    """Six steps undisturbed, and three with three more in a new engine."""
    plan = batch_plan(dist.get_world_size(), pack_tokens)
    engine, parameters = start(stage, dtype, persistence, plan.passes)
    undisturbed = train(engine, range(HALF), plan)
    values, moments = zero.whole_parameters(engine, parameters), zero.whole_moments(engine, parameters)
    undisturbed += train(engine, range(HALF, STEPS), plan)
    end = snapshot(engine, parameters)
    engine.destroy()

    engine, parameters = start(stage, dtype, persistence, plan.passes)
    zero.restore_state(engine, parameters, values, moments, HALF)
    restored = snapshot(engine, parameters)
    resumed = train(engine, range(HALF, STEPS), plan)
    resumed_end = snapshot(engine, parameters)
    engine.destroy()
    saved = values | moments
    return {
        "losses": undisturbed,
        "resumed": resumed,
        "partitioned": stage == 3 and any(p.numel() == 0 for p in parameters.values()),
        "passes": plan.passes,
        "moved": sum(not torch.equal(values[name], end[name]) for name in values),
        "parameters": len(values),
        "restored_differs": [name for name in saved if not torch.equal(saved[name], restored[name])],
        "end_differs": [name for name in end if not torch.equal(end[name], resumed_end[name])],
    }


def main(rank: int, world: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=120), world_size=world, rank=rank)
    found: dict[str, Any] = {"plain": plain_losses()}
    # Stage 3 last: it leaves its marks on torch.
    found["2 fp32 packed"] = compare_resumed(2, torch.float32, pack_tokens=30)
    for stage in (0, 1, 2, 3):
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            if (stage, name) != (0, "bf16"):
                found[f"{stage} {name}"] = compare_resumed(stage, dtype)
    found["3 fp32 packed"] = compare_resumed(3, torch.float32, pack_tokens=30)
    found["3 fp32 persistent"] = compare_resumed(3, torch.float32, persistence=150)
    if rank == 0:
        with open(result, "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
