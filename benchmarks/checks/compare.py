"""`kasa compare` killed in the middle and started again: nothing that was finished is done twice, and a table comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.core import Measurement, Setting, check
from pipeline.artifacts.store import ArtifactStore
from pipeline.run.lineage import stored_artifacts
from tests.support.processes import beneath, end_all, start_kasa, wait_for
from tests.support.tiny_inputs import write_tiny_inputs

PATIENCE_S = 900.0
METHODS = ("kasa", "kasa:weight", "kasa-without-d", "lora", "pissa", "full")
SEEDS = 2
# The driver is killed when so many adapters are complete.
KILL_AFTER = 5
COMMAND = (
    "compare", "recipe.yaml", "--methods", ",".join(METHODS), "--seeds", str(SEEDS), "--json",
    "train.max_steps=6", "train.workers=1",
)  # fmt: skip


@check(bar=0, direction="at most", unit="expectations not met")
def compare(setting: Setting) -> Measurement:
    """Six methods, two seeds, tiny model, one command, its driver killed after five trainings: nothing finished is done twice."""
    folder = setting.scratch / "compare"
    folder.mkdir()
    write_tiny_inputs(folder)
    store = ArtifactStore(folder / "workspace")
    process = start_kasa(list(COMMAND), folder)
    wait_for(lambda: _trained(folder) >= KILL_AFTER, process, PATIENCE_S)
    left = beneath(process)
    process.kill()
    process.communicate()
    end_all(left)
    before = _times_of_making(store)
    first = _finished(folder)
    again = _finished(folder)
    after = _times_of_making(store)
    wrong = [f"{name} was made twice" for name, made in before.items() if after.get(name) != made]
    if _trained(folder) != len(METHODS) * SEEDS:
        wrong.append(f"{_trained(folder)} adapters were trained, not {len(METHODS) * SEEDS}")
    if again["reused"] != again["trials"]:
        wrong.append(f"the finished comparison found {again['reused']} of {again['trials']} trials")
    if again["methods"] != first["methods"]:
        wrong.append("the finished comparison came to another result")
    if set(first["methods"]) != {"base", *METHODS} or not all(row["metrics"] for row in first["methods"].values()):
        wrong.append(f"the table holds {sorted(first['methods'])}")
    made = {file.suffix for file in (folder / first["folder"]).glob("comparison.*")}
    if made != {".md", ".json", ".svg", ".png"}:
        wrong.append(f"the folder holds {sorted(made)}")
    wrong += _flaws_in_mlflow(folder, first)
    details = {
        "complete_when_killed": sorted(before),
        "conclusion": first["conclusion"],
        "trials": first["trials"],
        "reused_after_the_kill": first["reused"],
        "methods": first["methods"],
    }
    return Measurement(len(wrong), details, flaws=tuple(wrong))


def _finished(folder: Path) -> dict[str, Any]:
    process = start_kasa(list(COMMAND), folder)
    out, said = process.communicate(timeout=PATIENCE_S)
    if process.returncode:
        raise RuntimeError(f"`kasa compare` ended with {process.returncode}: {said[-3000:]}")
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def _trained(folder: Path) -> int:
    return len(list((folder / "workspace" / "artifacts" / "train").glob("*/manifest.json")))


def _times_of_making(store: ArtifactStore) -> dict[str, str]:
    return {one.name: one.made.isoformat() for one in stored_artifacts(store)}


def _flaws_in_mlflow(folder: Path, result: dict[str, Any]) -> list[str]:
    """One parent run with a finished child for each trial."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'workspace' / 'mlflow.db'}")
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()], max_results=1000)
    parents = [run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == result["run_id"]]
    names = {run.info.run_name for run in children if run.info.status == "FINISHED"}
    flaws = [] if parents == [result["run_id"]] else [f"MLflow has the parent runs {parents}"]
    if len(children) != result["trials"] or len(names) != result["trials"]:
        flaws.append(f"MLflow has {len(children)} trials, {len(names)} of them finished, not {result['trials']}")
    return flaws
