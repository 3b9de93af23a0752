"""Stage 3 on two processes from the start, as the training worker has it: no rank holds the base, all compute in bf16."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support import ROOT

SCRIPT = Path(__file__).with_name("partitioned_script.py")


def test_two_ranks_load_a_half_each_and_compute_in_one_type(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[arg-type]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            command = [sys.executable, str(SCRIPT), str(tmp_path)]
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
    assert [process.wait(timeout=1200) for process in processes] == [0, 0], "\n".join(log.read_text() for log in logs)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8"))
        assert found["types"] == ["torch.bfloat16"]
        assert found["held"] == found["whole"] / 2
