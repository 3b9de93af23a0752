"""Stage 3 on two processes from the start, as the training worker has it: no rank holds the base, all compute in bf16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.ranks import start_ranks


@pytest.mark.processes
def test_two_ranks_load_a_half_each_and_compute_in_one_type(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[arg-type]
    start_ranks("tests.pipeline.training.partitioned_script", [str(tmp_path)], 2, tmp_path).wait()
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8"))
        assert found["types"] == ["torch.bfloat16"]
        assert found["held"] == found["whole"] / 2
