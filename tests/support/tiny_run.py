"""A tiny random LLaMA, its data and recipe, run for real through the `kasa` command: Ray, DeepSpeed and MLflow."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.core.files import read_journal
from pipeline.run.graph import STAGES
from pipeline.training.job import ROLL_CALL
from tests.support.processes import start_kasa, wait_for
from tests.support.tiny_inputs import STEPS, write_tiny_inputs

PATIENCE_S = 900


@dataclass(frozen=True)
class Bench:
    """A base, data and a recipe in a folder of their own; every run writes to `folder/WORKSPACE`."""

    folder: Path

    def start(
        self, workspace: str, *overrides: str, environment: Mapping[str, str] | None = None, is_cold: bool = False
    ) -> subprocess.Popen[str]:
        arguments = ["run", "recipe.yaml", f"workspace={workspace}", *overrides, "--json"]
        return start_kasa(arguments, self.folder, environment, is_cold)

    def copy_beginning(self, made: Mapping[str, str], workspace: str) -> None:
        """Give a new workspace what a run has made before training."""
        for stage in ("prepare", "spectra", "audit"):
            shutil.copytree(
                self.folder / made[stage], self.folder / workspace / "artifacts" / stage / Path(made[stage]).name
            )

    def finish(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        return self.finish_saying(process)[0]

    def finish_saying(self, process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
        """The result, and what was said on stderr."""
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err[-3000:]
        return json.loads(out.splitlines()[-1]), err

    def run(self, workspace: str, *overrides: str) -> dict[str, Any]:
        return self.finish(self.start(workspace, *overrides))

    def journal(self, workspace: str) -> list[dict[str, Any]]:
        """What the training in progress has written."""
        files = list((self.folder / workspace / "artifacts" / "train").glob("*.partial/journal.jsonl"))
        return [record for file in files for record in read_journal(file)]

    def mlflow(self, workspace: str) -> Any:
        from mlflow import MlflowClient

        uri = f"sqlite:///{self.folder / workspace / 'mlflow.db'}"
        return MlflowClient(uri, uri)  # what an earlier test set for the whole process means nothing here


def make_bench(folder: Path) -> Bench:
    """Write base, data and recipe, and files as users have them, named like packages: nothing may import them."""
    write_tiny_inputs(folder)
    for name in ("pipeline", "kasa", "recipes"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name}.py of the current folder was imported')\n")
    return Bench(folder)


def adapter_bytes(result: dict[str, Any], bench: Bench) -> bytes:
    return (bench.folder / result["artifacts"]["train"] / "adapter" / "tensors.safetensors").read_bytes()


def runs_under(client: Any, parent: str) -> list[Any]:
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    return client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")


def parents(client: Any) -> list[Any]:
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    return [r for r in client.search_runs([experiment.experiment_id]) if "mlflow.parentRunId" not in r.data.tags]


def assert_recorded_once(bench: Bench, workspace: str, result: dict[str, Any]) -> None:
    """One parent with a child for each stage, all finished, and every step of the loss exactly once."""
    client = bench.mlflow(workspace)
    children = runs_under(client, result["run_id"])
    assert sorted(run.data.tags["kasa.stage"] for run in children) == sorted(STAGES)
    assert {run.info.status for run in [*children, client.get_run(result["run_id"])]} == {"FINISHED"}
    assert {run.info.run_id for run in children} == set(result["stage_runs"].values())
    history = client.get_metric_history(result["stage_runs"]["train"], "loss")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))


def mid_training(bench: Bench, workspace: str, process: subprocess.Popen[str], step: int = 3) -> list[psutil.Process]:
    """Wait until an odd step is done, behind the checkpoint of the one before; returns the training workers by rank."""
    wait_for(lambda: any(record.get("step", 0) >= step for record in bench.journal(workspace)), process, PATIENCE_S)
    roll_call = next((bench.folder / workspace / "artifacts" / "train").glob(f"*.partial/{ROLL_CALL}"))
    said = [(roll_call / f"{rank}.process").read_text(encoding="utf-8") for rank in range(2)]
    return [psutil.Process(int(words.split()[1])) for words in said]
