"""`kasa compare` killed in the middle and started again: nothing finished is repeated, and the table comes out whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import finish, kill_with_descendants, times_of_completion
from tests.support.processes import start_kasa, wait_for
from tests.support.tiny_run import PATIENCE_S, Bench, make_bench, parents, runs_under

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.xdist_group("end_to_end")]

METHODS = ("kasa", "kasa:weight", "kasa-without-d", "lora", "pissa", "full")
SEEDS = 2
# The driver is killed when so many adapters are complete.
KILL_AFTER = 5
COMMAND = [
    "compare", "recipe.yaml", "--methods", ",".join(METHODS), "--seeds", str(SEEDS), "--json",
    "train.max_steps=6", "train.workers=1",
]  # fmt: skip


def test_a_killed_comparison_repeats_nothing_finished(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    process = start_kasa(COMMAND, bench.folder)
    wait_for(lambda: trained(bench) >= KILL_AFTER, process, PATIENCE_S)
    kill_with_descendants(process)
    before = times_of_completion(bench.folder / "workspace")
    first, again = (finish(start_kasa(COMMAND, bench.folder)) for _ in range(2))
    after = times_of_completion(bench.folder / "workspace")

    assert {name: after.get(name) for name in before} == before
    assert trained(bench) == len(METHODS) * SEEDS
    assert again["reused"] == again["trials"]
    assert again["methods"] == first["methods"]
    assert set(first["methods"]) == {"base", *METHODS}
    assert all(row["metrics"] for row in first["methods"].values())
    written = {file.suffix for file in (bench.folder / first["folder"]).glob("comparison.*")}
    assert written == {".md", ".json", ".svg", ".png"}
    assert_one_child_for_each_trial(bench, first)


def trained(bench: Bench) -> int:
    """How many adapters are complete."""
    return len(list((bench.folder / "workspace" / "artifacts" / "train").glob("*/manifest.json")))


def assert_one_child_for_each_trial(bench: Bench, result: dict[str, Any]) -> None:
    """MLflow has one parent run, with a finished child of its own name for each trial."""
    client = bench.mlflow("workspace")
    assert [run.info.run_id for run in parents(client)] == [result["run_id"]]
    children = runs_under(client, result["run_id"])
    assert len(children) == result["trials"]
    assert {run.info.status for run in children} == {"FINISHED"}
    assert len({run.info.run_name for run in children}) == result["trials"]
