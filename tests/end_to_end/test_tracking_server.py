"""A whole run against a real MLflow server with proxied artifacts, which dies during the training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.files import read_journal
from pipeline.run.graph import STAGES
from pipeline.tracking.availability import RETRY_VARIABLE
from tests.support.postgres import postgres
from tests.support.processes import wait_for
from tests.support.tiny_run import PATIENCE_S, STEPS, Bench, parents, runs_under
from tests.support.tracking_server import TrackingServer, curve_faults, outage, tracking_server

pytestmark = pytest.mark.cluster

KILL_AFTER, GO_ON = 5, 10


def run_through_outage(bench: Bench, server: TrackingServer, workspace: str) -> tuple[dict[str, Any], str]:
    """The server dies once some steps are in, and comes back after the training has gone on without it."""

    def last_step() -> int:
        return max((record.get("step", 0) for record in bench.journal(workspace)), default=0)

    def gone_on() -> bool:
        trained = (bench.folder / workspace / "artifacts" / "train").glob("*/adapter")
        return last_step() >= KILL_AFTER + GO_ON or any(not path.parent.suffix for path in trained)

    process = bench.start(workspace, environment={"MLFLOW_TRACKING_URI": server.uri})
    assert outage(server, process, last_step, KILL_AFTER, gone_on, PATIENCE_S) < STEPS, "too fast to be interrupted"
    return bench.finish_saying(process)


def assert_whole(bench: Bench, server: TrackingServer, result: dict[str, Any], folder: Path) -> None:
    """One parent, one child for each stage, every point of the curves once, artifacts there to be fetched."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri, server.uri)
    children = runs_under(client, result["run_id"])
    assert len(parents(client)) == 1
    assert sorted(run.data.tags["kasa.stage"] for run in children) == sorted(STAGES)
    assert {run.info.status for run in [*children, client.get_run(result["run_id"])]} == {"FINISHED"}
    journal = read_journal(bench.folder / result["artifacts"]["train"] / "journal.jsonl")
    assert [record["step"] for record in journal] == list(range(1, STEPS + 1))
    train = result["stage_runs"]["train"]
    assert curve_faults(client, train, journal) == {"missing": 0, "repeated": 0, "out_of_order": 0, "wrong": 0}
    assert client.get_run(train).info.artifact_uri.startswith("mlflow-artifacts:")
    assert {file.path for file in client.list_artifacts(train, "adapter")} >= {"adapter/tensors.safetensors"}
    fetched = Path(client.download_artifacts(train, "adapter/tensors.safetensors", str(folder)))
    stored = bench.folder / result["artifacts"]["train"] / "adapter" / "tensors.safetensors"
    assert fetched.read_bytes() == stored.read_bytes()
    system = [point.step for point in client.get_metric_history(train, "system/cpu_utilization_percentage")]
    assert system == list(range(len(system)))
    assert system


def test_a_server_that_dies_during_training_loses_nothing(bench: Bench, tmp_path: Path) -> None:
    with tracking_server(tmp_path / "server") as server:
        result, said = run_through_outage(bench, server, "outage")
        assert_whole(bench, server, result, tmp_path)
    assert f"MLflow at {server.uri} is away" in said
    assert not (bench.folder / "outage" / "mlflow.db").exists()


@pytest.mark.soak
def test_a_server_on_postgresql_dies_during_training(bench: Bench, tmp_path: Path) -> None:
    with postgres() as database, tracking_server(tmp_path / "server", database.uri) as server:
        result, said = run_through_outage(bench, server, "postgresql")
        assert_whole(bench, server, result, tmp_path)
    assert f"MLflow at {server.uri} is away" in said


@pytest.mark.soak
def test_a_server_that_stays_away_ends_the_command_and_the_same_command_goes_on(bench: Bench, tmp_path: Path) -> None:
    with tracking_server(tmp_path / "server") as server:
        surroundings = {"MLFLOW_TRACKING_URI": server.uri, RETRY_VARIABLE: "5"}
        process = bench.start("patience", environment=surroundings)
        wait_for(lambda: bench.journal("patience"), process, PATIENCE_S)
        server.kill()
        _, said = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
        assert "run the same command again" in said
        assert "Traceback" not in said
        begun = time.monotonic()
        again = bench.start("patience", environment=surroundings)
        _, said = again.communicate(timeout=PATIENCE_S)
        assert again.returncode == 2
        assert "start the server, or correct or unset MLFLOW_TRACKING_URI" in said
        assert time.monotonic() - begun < 60
        server.start()
        result = bench.finish(bench.start("patience", environment=surroundings))
        assert result["stages"]["train"] == "reused"
        assert_whole(bench, server, result, tmp_path)
