"""Short trainings of a small random LLaMA in real processes, for the checks and tests of training."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from kasa import ModelWeights, compute_spectra, find_targets, read_adapter
from kasa.spectra import Triplets
from pipeline.config.recipe import Recipe, parse_recipe
from pipeline.core.files import Record, read_journal
from pipeline.training import worker
from pipeline.training.job import JOURNAL
from tests.support.ranks import start_ranks, write_inputs

STEPS, BATCH, SAMPLES, RANK = 30, 8, 60, 8
# Of a linear layer's A and B (64 x 8 and 160 x 8) stage 3 keeps the smaller whole on every rank.
PERSISTENT_ELEMENTS = 600
CHECKPOINT_EVERY, PATIENCE_S = 4, 900

Sample = dict[str, list[int]]


def small_base(folder: Path) -> tuple[Path, dict[str, Triplets]]:
    """A random LLaMA of two layers in `folder/base`, and the spectra of its linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, initializer_range=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    spectra = compute_spectra(ModelWeights(model), find_targets(model, "all-linear"), RANK)
    return folder / "base", spectra


def small_recipe(base: Path, folder: Path, stage: int, workers: int) -> Recipe:
    """30 fp32 steps; at stage 3 some tensors of the adapter stay whole on every rank, the others are partitioned."""
    deepspeed = f"cpu_zero{stage}"
    if stage == 3:
        deepspeed = str(folder / "zero3.json")
        section = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS}
        Path(deepspeed).write_text(json.dumps({"zero_optimization": section}), encoding="utf-8")
    return parse_recipe(
        {
            "name": "zero",
            "base": {"model": str(base)},
            "data": {"train": "rows.jsonl", "max_tokens": 64},
            "adapter": {"rank": RANK, "truncation": "weight", "singular_value_weight": 1e-2, "orthogonality_weight": 1e-2},
            "train": {
                "workers": workers, "deepspeed": deepspeed, "precision": "fp32", "epochs": STEPS * BATCH / SAMPLES,
                "batch_size": BATCH, "micro_batch_size": 2, "learning_rate": 5e-3, "weight_decay": 0.1,
                "checkpoint_every": CHECKPOINT_EVERY,
            },
        },
        "zero",
    )  # fmt: skip


def small_samples(vocabulary: int = 250) -> list[Sample]:
    """Unlike lengths and numbers of labels, with something to learn: each token follows from the one before."""
    generator = random.Random(0)
    samples = []
    for index in range(SAMPLES):
        ids = [generator.randrange(1, vocabulary)]
        while len(ids) < 8 + index % 17:
            ids.append((ids[-1] * 7 + 3) % (vocabulary - 1) + 1)
        prompt = 1 + index % 4
        samples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return samples


def prepare_run(run: Path, spectra: Mapping[str, Triplets], validation: Sequence[Sample] = ()) -> Path:
    """Write a run's inputs into its folder."""
    write_inputs(run, small_samples(), spectra, validation)
    return run


def write_recipe(recipe: Recipe, run: Path) -> None:
    """Where the ranks look for it."""
    (run / "recipe.json").write_text(recipe.model_dump_json(by_alias=True), encoding="utf-8")


def train_run(recipe: Recipe, run: Path, kill_after: int | None = None) -> int:
    """Train to the end, or until SIGKILL after some step; the step it began after."""
    write_recipe(recipe, run)
    journal = run / "work" / JOURNAL
    checkpoints = run / "work" / "checkpoints"
    begun = worker.newest_step(checkpoints)
    group = start_ranks("tests.support.ranks", [str(run)], recipe.train.workers, run)
    if kill_after is None:
        group.wait()
        return begun
    deadline = time.monotonic() + PATIENCE_S
    while not any(record["step"] >= kill_after for record in read_journal(journal)):
        if time.monotonic() > deadline or any(process.poll() is not None for process in group.processes):
            group.kill()
            raise RuntimeError(f"step {kill_after} was not seen: {group.logs[0].read_text()[-2000:]}")
        time.sleep(0.01)
    group.kill()
    return begun


def outcome(run: Path) -> tuple[list[Record], dict[str, torch.Tensor]]:
    """The journal and the trained tensors."""
    return read_journal(run / "work" / JOURNAL), read_adapter(run / "work" / worker.ADAPTER).tensors
