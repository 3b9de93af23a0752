"""One rank of `test_partitioned_loading.py`: the first thing a process asks of DeepSpeed is to load a base partitioned.

usage: python -m tests.pipeline.training.partitioned_script BASE_FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import torch.distributed as dist  # noqa: E402

from kasa import KasaConfig, attach, find_targets  # noqa: E402
from kasa.adapter import trainable_parameters  # noqa: E402
from pipeline.config.deepspeed import complete_config, load_deepspeed_config, with_accumulation  # noqa: E402
from pipeline.config.settings import TrainSettings  # noqa: E402
from pipeline.models.loading import load_base  # noqa: E402
from pipeline.training import zero  # noqa: E402
from tests.support.ranks import process_group  # noqa: E402


def main(folder: Path) -> None:
    """Load, and write down what this rank holds."""
    settings = TrainSettings(
        workers=dist.get_world_size(), batch_size=4, micro_batch_size=1, deepspeed="cpu_zero3", precision="bf16"
    )
    config = with_accumulation(
        complete_config(load_deepspeed_config(settings.deepspeed), settings), settings.workers, 2
    )
    with zero.partitioned_loading(config):
        model = load_base(folder, "bf16")
        attach(model, find_targets(model, "all-linear"), KasaConfig(rank=4, truncation="none"))
        engine = zero.start_engine(model, config, 0.0, timeout_s=60)
    trained = {id(parameter) for parameter in trainable_parameters(engine.module).values()}
    base = [parameter for parameter in engine.module.parameters() if id(parameter) not in trained]
    found = {
        "types": sorted({str(parameter.dtype) for parameter in engine.module.parameters()}),
        "held": sum(parameter.ds_tensor.numel() for parameter in base),
        "whole": sum(parameter.ds_numel for parameter in base),
    }
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    with process_group():
        main(Path(sys.argv[1]))
    os._exit(0)
