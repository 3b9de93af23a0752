"""Real training processes without Ray: what the training checks start, watch and kill."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kasa.spectra import Triplets
from kasa.spectra_file import save_spectra
from kasa.targets import Target
from pipeline.apps.plan import checked_targets
from pipeline.config.recipe import Recipe, parse_recipe
from pipeline.methods.choice import method_of
from pipeline.models.base import BaseModel
from pipeline.models.prompting import LANGUAGE_MODEL, Head
from pipeline.models.shapes import meta_model, model_config
from pipeline.run.stages.train import deepspeed_settings
from pipeline.training.job import TrainJob
from pipeline.training.worker import train_worker
from tests.support import ROOT
from tests.support.forking import start_python


@dataclass(frozen=True)
class Group:
    """Processes of one process group, with a log file for each rank."""

    processes: Sequence[subprocess.Popen[Any]]
    logs: Sequence[Path]

    def wait(self) -> None:
        """Wait for all ranks.

        Raises:
            RuntimeError: one failed; with the end of its log.
        """
        codes = [process.wait() for process in self.processes]
        for rank, code in enumerate(codes):
            if code:
                raise RuntimeError(f"rank {rank} ended with {code}: {self.logs[rank].read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL to every rank that is left."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def start_ranks(
    module: str, arguments: Sequence[str], workers: int, folder: Path, environment: Mapping[str, str] | None = None
) -> Group:
    """Start `python -m module *arguments` as every rank of a process group; logs go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes, logs = [], [folder / f"rank-{rank}-of-{workers}.log" for rank in range(workers)]
    for rank, path in enumerate(logs):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
        with path.open("w") as log:
            processes.append(
                start_python(
                    ["-m", module, *arguments],
                    {**os.environ, **shared, **ranks, **(environment or {})},
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return Group(processes, logs)


@contextmanager
def process_group() -> Iterator[None]:
    """Within the block this process is the rank that `start_ranks` made it."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    torch.set_num_threads(1)
    yield
    dist.barrier()
    dist.destroy_process_group()


def shape_of(recipe: Recipe) -> nn.Module:
    """The recipe's base, which must be a folder, on the meta device."""
    config = model_config(recipe.base.model)
    assert config is not None
    return meta_model(config, recipe.base.head)


def training_job(recipe: Recipe, folder: Path) -> TrainJob:
    """The job over the inputs that `write_inputs` left in `folder`; it fills `folder/work`.

    An adapter in `folder/start` is gone on from.
    """
    return TrainJob(
        base_folder=Path(recipe.base.model),
        prepared=folder / "prepared",
        work=folder / "work",
        method=method_of(
            recipe,
            BaseModel("base", Path(recipe.base.model)),
            checked_targets(recipe, shape_of(recipe)),
            folder / "spectra",
            (folder / "start") if (folder / "start").exists() else None,
        ),
        settings=recipe.train,
        deepspeed=deepspeed_settings(recipe),
    )


Rows = Sequence[Mapping[str, Any]]


def write_inputs(
    folder: Path,
    rows: Rows,
    spectra: Mapping[str, Triplets],
    validation: Rows = (),
    head: Head = LANGUAGE_MODEL,
) -> None:
    """Prepared data of `rows` (their columns, and where they are from) and spectra, as the stages before training leave them."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    for split, samples in (("train", rows), ("validation", validation)):
        columns = {
            **{name: [row[name] for row in samples] for name in rows[0]},
            "source": [f"row {index}" for index in range(len(samples))],
        }
        if samples:
            Dataset.from_dict(columns).save_to_disk(str(folder / "prepared" / split))
    (folder / "prepared" / "summary.json").write_text(json.dumps({"train_rows": len(rows)}), encoding="utf-8")
    head.save(folder / "prepared")
    save_spectra(folder / "spectra", dict(spectra), dict.fromkeys(spectra, "0"))
    (folder / "work").mkdir()


def stand_in_spectra(targets: Sequence[Target], rank: int) -> dict[str, Triplets]:
    """Small random factors of the right shapes, where the values do not matter."""
    generator = torch.Generator().manual_seed(0)
    return {
        target.name: Triplets(
            left_OR=1e-3 * torch.randn(target.out_features, rank, generator=generator),
            singular_values_R=torch.full((rank,), 1e-3),
            right_RI=1e-3 * torch.randn(rank, target.in_features, generator=generator),
            largest=1.0,
            residual=0.0,
            orthogonality=0.0,
            method="svd",
        )
        for target in targets
    }


def count_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of distinct storages."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def main(folder: Path) -> None:
    """One rank of a training by the recipe in `folder/recipe.json`."""
    recipe = parse_recipe(json.loads((folder / "recipe.json").read_text(encoding="utf-8")), str(folder))
    with process_group():
        train_worker(training_job(recipe, folder))
    # Seen once: a library's thread that aborts the process at the interpreter's end, when all is written.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
