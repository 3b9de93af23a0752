"""A task that a tiny network learns by degrees: of nine letters, are most from one half of the alphabet? 1 or 0.

A hundred steps teach it some of that, four hundred nearly all; with shuffled labels there is nothing to learn.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ONES, ZEROS = "bdgjlnqsvx", "cfhkmprtwz"
LETTERS, TRAIN_ROWS, HELDOUT_ROWS = 9, 1500, 400

Row = dict[str, str]


def write_task(folder: Path, name: str, steps: int) -> None:
    """Base, data (`train.jsonl`, `shuffled.jsonl`, `heldout.jsonl`) and `recipe.yaml`, which trains for `steps` steps."""
    _write_base(folder / "base")
    rows, heldout = _rows(TRAIN_ROWS, seed=0), _rows(HELDOUT_ROWS, seed=1)
    labels = [row["completion"] for row in rows]
    random.Random(0).shuffle(labels)
    shuffled = [row | {"completion": label} for row, label in zip(rows, labels, strict=True)]
    for file, values in (("train", rows), ("shuffled", shuffled), ("heldout", heldout)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")
    recipe = {
        "name": name,
        "base": {"model": "./base"},
        "data": {
            "train": "train.jsonl", "heldout": "heldout.jsonl", "max_tokens": 32, "prompt_template": "{prompt}=",
        },
        "adapter": {"rank": 8, "truncation": "weight"},
        "spectra": {"audit_tokens": 256},
        "train": {
            "workers": 1, "deepspeed": "cpu_zero1", "precision": "fp32", "epochs": 100, "max_steps": steps,
            "batch_size": 16, "micro_batch_size": 16, "learning_rate": 2e-3, "schedule": "constant",
            "checkpoint_every": 1000,
        },
        "evaluate": {"kind": "choice", "choices": ["1", "0"], "batch_size": 100, "max_new_tokens": 1},
        "promotion": {"margin": 0.05, "guards": {"loss": 0.1}},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def _rows(count: int, seed: int) -> list[Row]:
    generator = random.Random(seed)
    words = ("".join(generator.choice(ONES + ZEROS) for _ in range(LETTERS)) for _ in range(count))
    return [
        {"prompt": word, "completion": str(int(2 * sum(letter in ONES for letter in word) > LETTERS))} for word in words
    ]


def _write_base(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(["<|end|>", *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    # Weights larger than usual: with the usual ones a frozen random network hardly tells its inputs apart.
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=260, initializer_range=0.15, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(folder)
