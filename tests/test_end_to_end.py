"""The whole flow for real: Ray, DeepSpeed and MLflow on a tiny random LLaMA, through the `kasa` command.

The tests build on one another's workspace, in the order in which they stand here.
"""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.processes import beneath, end_all, start_kasa, wait_for
from pipeline.journal import read_journal
from pipeline.keys import STAGES

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("end_to_end")]

ROOT = Path(__file__).parents[1]
STEPS = 6
PATIENCE_S = 400


@dataclass(frozen=True)
class Bench:
    """A base, data and a recipe in a folder of their own; every run writes to `folder/WORKSPACE`."""

    folder: Path

    def start(self, workspace: str, *overrides: str) -> subprocess.Popen[str]:
        return start_kasa(["run", "recipe.yaml", f"workspace={workspace}", *overrides, "--json"], self.folder)

    def finish(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err[-3000:]
        return json.loads(out.splitlines()[-1])

    def run(self, workspace: str, *overrides: str) -> dict[str, Any]:
        return self.finish(self.start(workspace, *overrides))

    def journal(self, workspace: str) -> list[dict[str, Any]]:
        """What the training in progress has written."""
        files = list((self.folder / workspace / "artifacts" / "train").glob("*.partial/journal.jsonl"))
        return [record for file in files for record in read_journal(file)]

    def mlflow(self, workspace: str) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(f"sqlite:///{self.folder / workspace / 'mlflow.db'}")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("end-to-end")
    _write_base(folder / "base")
    rows = [{"prompt": f"count {n % 20} from {n}", "completion": f"{n} {n + n % 20} done"} for n in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "tiny",
        "base": {"model": "./base"},
        "data": {"train": "rows.jsonl", "max_tokens": 64, "heldout_rows": 8},
        "adapter": {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]},
        "train": {
            "workers": 2, "deepspeed": "cpu_zero2", "precision": "fp32", "max_steps": STEPS, "batch_size": 8,
            "micro_batch_size": 2, "checkpoint_every": 2,
        },
        "evaluate": {"kind": "text", "workers": 1, "max_new_tokens": 4, "samples_shown": 2},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Bench(folder)


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


@pytest.fixture(scope="module")
def first(bench: Bench) -> dict[str, Any]:
    return bench.run("workspace")


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


def test_a_run_leaves_what_it_promises(bench: Bench, first: dict[str, Any]) -> None:
    assert first["stages"] == dict.fromkeys(STAGES, "computed")
    assert_recorded_once(bench, "workspace", first)
    assert "<html" in (bench.folder / first["report"]).read_text(encoding="utf-8")
    version = bench.mlflow("workspace").get_model_version("tiny", first["model"]["version"])
    assert version.tags["kasa.decision"] in ("promoted", "kept out")
    assert (bench.folder / first["artifacts"]["train"] / "adapter" / "prompting.json").exists()
    assert set(first["metrics"]) == {"base", "adapted"}
    assert not list((bench.folder / "workspace").rglob("*.partial"))


def test_the_same_run_again_makes_nothing_new(bench: Bench, first: dict[str, Any]) -> None:
    again = bench.run("workspace")
    assert again["stages"] == dict.fromkeys(STAGES, "reused")
    assert again["model"]["version"] == first["model"]["version"]
    assert again["run_id"] != first["run_id"]
    assert again["artifacts"] == first["artifacts"]
    client = bench.mlflow("workspace")
    assert len(client.search_model_versions("name = 'tiny'")) == 1
    assert len(runs_under(client, again["run_id"])) == len(STAGES)


def test_another_learning_rate_trains_again_and_only_that(bench: Bench, first: dict[str, Any]) -> None:
    changed = bench.run("workspace", "train.learning_rate=0.01")
    assert changed["stages"] == dict.fromkeys(STAGES, "computed") | {
        "prepare": "reused",
        "spectra": "reused",
        "audit": "reused",
    }
    assert changed["model"]["version"] != first["model"]["version"]
    assert adapter_bytes(changed, bench) != adapter_bytes(first, bench)
    assert_recorded_once(bench, "workspace", changed)


def mid_training(bench: Bench, workspace: str, process: subprocess.Popen[str]) -> None:
    """Wait until step 3 is done: behind the checkpoint of step 2, before that of step 4."""
    wait_for(lambda: any(record.get("step", 0) >= 3 for record in bench.journal(workspace)), process, PATIENCE_S)
    assert not any(record.get("step") == STEPS for record in bench.journal(workspace)), "too fast to be interrupted"


def test_a_killed_worker_changes_nothing_in_the_result(bench: Bench, first: dict[str, Any]) -> None:
    process = bench.start("killed-worker")
    mid_training(bench, "killed-worker", process)
    victims = beneath(process, "RayTrainWorker")
    assert len(victims) == 2
    victims[-1].send_signal(signal.SIGKILL)
    result = bench.finish(process)
    assert adapter_bytes(result, bench) == adapter_bytes(first, bench)
    assert_recorded_once(bench, "killed-worker", result)


def test_a_killed_driver_is_resumed_in_the_same_mlflow_runs(bench: Bench, first: dict[str, Any]) -> None:
    process = bench.start("killed-driver")
    mid_training(bench, "killed-driver", process)
    ray_processes = beneath(process)
    process.kill()
    process.wait()
    (interrupted,) = parents(bench.mlflow("killed-driver"))
    # Ray's own processes notice the driver's death by themselves; the next run must not depend on how fast.
    try:
        result = bench.run("killed-driver")
    finally:
        end_all(ray_processes)
    assert result["run_id"] == interrupted.info.run_id
    assert len(parents(bench.mlflow("killed-driver"))) == 1
    assert_recorded_once(bench, "killed-driver", result)
    assert result["stages"] == dict.fromkeys(STAGES, "computed") | {
        "prepare": "reused",
        "spectra": "reused",
        "audit": "reused",
    }
    assert adapter_bytes(result, bench) == adapter_bytes(first, bench)


def test_a_killed_head_ends_the_run_soon_and_the_next_goes_on(bench: Bench, first: dict[str, Any]) -> None:
    process = bench.start("killed-head")
    mid_training(bench, "killed-head", process)
    ray_processes = beneath(process)
    (head,) = beneath(process, "gcs_server")
    head.kill()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said.splitlines()[-1] == "failed: Ray's head process died; the same command goes on from here"
    try:
        result = bench.run("killed-head")
    finally:
        end_all(ray_processes)
    assert_recorded_once(bench, "killed-head", result)
    assert adapter_bytes(result, bench) == adapter_bytes(first, bench)
