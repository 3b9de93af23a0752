"""A tiny random LLaMA, data and a recipe for it: the smallest complete run, for checks and tests."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Long enough that whoever sees step 3 done can still interfere.
STEPS = 30


def write_tiny_inputs(folder: Path) -> None:
    """Write `base/`, `rows.jsonl` and `recipe.yaml`, whose paths are relative to the folder."""
    _write_base(folder / "base")
    rows = [{"prompt": f"count {n % 20} from {n}", "completion": f"{n} {n + n % 20} done"} for n in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "tiny",
        "base": {"model": "./base"},
        "data": {"train": "rows.jsonl", "max_tokens": 64, "heldout_rows": 8},
        "adapter": {"rank": 4, "truncation": "loss", "targets": ["q_proj", "v_proj", "down_proj"]},
        "train": {
            "workers": 2, "deepspeed": "cpu_zero2", "precision": "fp32", "epochs": 2, "max_steps": STEPS,
            "batch_size": 8, "micro_batch_size": 2, "checkpoint_every": 2,
        },
        "evaluate": {"kind": "text", "workers": 1, "max_new_tokens": 4, "samples_shown": 2},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def _write_base(folder: Path) -> None:
    import torch

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["count from done"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(tokenizer), max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
