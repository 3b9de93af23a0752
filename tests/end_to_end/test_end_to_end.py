"""The whole flow for real, through the `kasa` command. The tests build on one another's workspace, in their order here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.run.graph import STAGES
from tests.support import ROOT
from tests.support.harness_tasks import write_harness_tasks
from tests.support.processes import start_kasa
from tests.support.tiny_run import STEPS, Bench, adapter_bytes, assert_recorded_once, runs_under

# Python reads it before anything else.
WITHOUT_TORCH = """
import importlib.machinery
import sys

class Unwanted:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "deepspeed"):
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is not wanted in this process")

    def exec_module(self, module):
        raise AssertionError

sys.meta_path.insert(0, Unwanted())
"""

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("workspace")]


def test_a_run_leaves_what_it_promises(bench: Bench, first: dict[str, Any]) -> None:
    assert first["stages"] == dict.fromkeys(STAGES, "computed")
    assert_recorded_once(bench, "workspace", first)
    assert "<html" in (bench.folder / first["report"]).read_text(encoding="utf-8")
    version = bench.mlflow("workspace").get_model_version("tiny", first["model"]["version"])
    assert version.tags["kasa.decision"] in ("promoted", "kept out")
    assert (bench.folder / first["artifacts"]["train"] / "adapter" / "prompting.json").exists()
    assert set(first["metrics"]) == {"base", "adapted"}
    assert not list((bench.folder / "workspace").rglob("*.partial"))


def test_mlflow_knows_where_a_run_comes_from(bench: Bench, first: dict[str, Any]) -> None:
    client = bench.mlflow("workspace")
    parent = client.get_run(first["run_id"])
    assert parent.data.tags["kasa.seed.train"] == "0"
    assert parent.data.tags["kasa.cluster.nodes"] == "1"
    assert float(parent.data.tags["kasa.cluster.cpus"]) >= 2
    assert len(parent.data.tags["kasa.code.digest"]) == 16
    assert parent.data.params["train.max_steps"] == str(STEPS)
    assert {file.path for file in client.list_artifacts(first["run_id"])} == {
        "recipe.yaml",
        Path(first["report"]).name,
    }
    inputs = {
        stage: {given.dataset.name: given.dataset.digest for given in client.get_run(run_id).inputs.dataset_inputs}
        for stage, run_id in first["stage_runs"].items()
    }
    assert set(inputs["prepare"]) == {"tiny-train", "tiny-heldout"}
    assert inputs["train"] == {"tiny-train": inputs["prepare"]["tiny-train"]}
    assert inputs["evaluate"] == {"tiny-heldout": inputs["prepare"]["tiny-heldout"]}
    version = client.get_model_version("tiny", first["model"]["version"])
    assert version.tags["kasa.data_digest"].startswith(inputs["train"]["tiny-train"])


def test_the_same_run_again_makes_nothing_new_and_is_quick(bench: Bench, first: dict[str, Any], tmp_path: Path) -> None:
    # It takes 10 s to load torch and transformers, and nothing here to compute with them.
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    again = bench.finish(bench.start("workspace", environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"}))
    assert again["stages"] == dict.fromkeys(STAGES, "reused")
    assert again["model"]["version"] == first["model"]["version"]
    assert again["run_id"] != first["run_id"]
    assert again["artifacts"] == first["artifacts"]
    client = bench.mlflow("workspace")
    assert len(client.search_model_versions("name = 'tiny'")) == 1
    assert len(runs_under(client, again["run_id"])) == len(STAGES)
    for stage, run_id in again["stage_runs"].items():
        tags = client.get_run(run_id).data.tags
        maker = client.get_run(first["stage_runs"][stage]).info
        assert tags["kasa.reused_from"] == maker.run_id
        assert f"(#/experiments/{maker.experiment_id}/runs/{maker.run_id})" in tags["mlflow.note.content"]


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
    (trained,) = [
        run for run in runs_under(bench.mlflow("workspace"), changed["run_id"]) if run.info.run_name == "train"
    ]
    assert trained.data.tags["kasa.made_anew_for"] == "train.learning_rate 0.0005 -> 0.01"


def test_a_forced_stage_and_tasks_of_the_harness_are_made_anew(bench: Bench, first: dict[str, Any]) -> None:
    pytest.importorskip("lm_eval")
    write_harness_tasks(bench.folder / "tasks")
    tasks = "evaluate.harness={tasks: [counting, reading], include: tasks}"
    found, said = bench.finish_saying(bench.start("workspace", "--force", "audit", tasks))
    assert found["stages"] == dict.fromkeys(STAGES, "reused") | dict.fromkeys(
        ["audit", "evaluate", "register"], "computed"
    )
    assert "audit: recomputed: you asked for it" in said
    assert {stage: path for stage, path in found["artifacts"].items() if stage != "evaluate"} == {
        stage: path for stage, path in first["artifacts"].items() if stage != "evaluate"
    }
    assert found["model"]["version"] != first["model"]["version"]
    assert found["metrics"] == first["metrics"]
    assert [row["name"] for row in found["harness"]] == [
        "counting/acc",
        "counting/acc_norm",
        "reading/word_perplexity",
    ]
    for row in found["harness"]:
        logged = bench.mlflow("workspace").get_run(found["stage_runs"]["evaluate"]).data.metrics
        assert {name: logged[f"{name}.harness/{row['name']}"] for name in ("base", "adapted")} == row["values"]
    assert "counting/acc_norm" in (bench.folder / found["report"]).read_text(encoding="utf-8")


def test_a_retraining_finds_everything_made_and_then_nothing_new(bench: Bench, first: dict[str, Any]) -> None:
    client = bench.mlflow("workspace")
    before = len(client.search_model_versions("name = 'tiny'"))
    ticks = [
        bench.finish(start_kasa(["retrain", "recipe.yaml", "workspace=workspace", "--json"], bench.folder))
        for _ in range(2)
    ]
    assert [tick["status"] for tick in ticks] == ["retrained", "unchanged"]
    assert ticks[0]["stages"] == dict.fromkeys(STAGES, "reused")
    assert ticks[0]["artifacts"] == first["artifacts"]
    assert len(client.search_model_versions("name = 'tiny'")) == before
    assert ticks[1]["last"]["run_id"] == ticks[0]["run_id"]


def test_a_tuned_run_that_drops_nothing_trains_once_at_each_rate(bench: Bench) -> None:
    few = ("adapter.truncation=none", "data.validation_rows=8", "train.max_steps=4", "train.workers=1")
    result, said = bench.finish_saying(bench.start("tuned", "--tune", "learning_rate=1e-9,1e-2", *few))
    assert "tuned: train.learning_rate=0.01 (validation loss " in said
    assert "a better rate may lie beyond those tried" in said
    assert result["stages"] == {
        "prepare": "reused",
        "train": "reused",
        "evaluate": "computed",
        "register": "computed",
    }
    assert len(list((bench.folder / "tuned" / "artifacts" / "train").glob("*/manifest.json"))) == 2
    page = (bench.folder / result["report"]).read_text(encoding="utf-8")
    assert "Nothing was cut from the base weights." in page
    assert "learning_rate: 0.01" in page
