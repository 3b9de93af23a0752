"""Runs and metrics in real stores: an SQLite file, and a server on PostgreSQL whose database goes away."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import stopping
from pipeline.core.errors import TrackingAwayError, WorkspaceError
from pipeline.core.files import Record
from pipeline.registry.store import Registry
from pipeline.tracking.live_metrics import Delivery, delivering
from pipeline.tracking.runs import Tracking, _batches
from tests.support.postgres import Postgres, postgres
from tests.support.tracking_server import curve_faults, tracking_server

# One database, made once.
pytestmark = pytest.mark.xdist_group("tracking")

NO_FAULTS = {"missing": 0, "repeated": 0, "out_of_order": 0, "wrong": 0}


def journal(first: int, last: int, delay_s: float = 0) -> list[Record]:
    """Steps `first` to `last`, ended a second apart, all of them `delay_s` later."""
    return [
        {"step": step, "steps": 100, "loss": 1 / step, "learning_rate": 0.1 * step, "time_s": 1e9 + step + delay_s}
        for step in range(first, last + 1)
    ]


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Tracking(tmp_path_factory.mktemp("workspace"), "tried")


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture
def on_postgres(database: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracking]:
    with tracking_server(tmp_path / "server", database.uri) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield Tracking(tmp_path, "tried")


def assert_steps_once(tracking: Tracking, run_id: str, records: list[Record]) -> None:
    assert curve_faults(tracking.client, run_id, records) == NO_FAULTS


def test_a_step_is_delivered_once(sqlite: Tracking) -> None:
    run_id = sqlite.start_run("train", {})
    assert sqlite.deliver(run_id, "loss", journal(1, 3)) == 3
    # A restart repeats steps at another time.
    assert sqlite.deliver(run_id, "loss", journal(1, 5, delay_s=60)) == 5
    assert sqlite.deliver(run_id, "loss", journal(4, 6, delay_s=60), after=5) == 6
    assert_steps_once(sqlite, run_id, journal(1, 6))


def test_a_record_sent_twice_is_one_point(sqlite: Tracking) -> None:
    run_id = sqlite.start_run("train", {})
    sqlite.deliver(run_id, "loss", journal(1, 4))
    sqlite.deliver(run_id, "loss", journal(3, 6), after=2)
    assert_steps_once(sqlite, run_id, journal(1, 6))


def test_points_carry_the_time_of_their_step(sqlite: Tracking) -> None:
    run_id = sqlite.start_run("train", {})
    sqlite.deliver(run_id, "loss", journal(1, 2))
    assert [point.timestamp for point in sqlite.client.get_metric_history(run_id, "loss")] == [
        1_000_000_001_000,
        1_000_000_002_000,
    ]


def test_batches_hold_whole_steps() -> None:
    steps = [[(step, metric) for metric in range(300)] for step in range(4)]
    assert list(_batches(steps)) == steps
    small = [[(step, metric) for metric in range(3)] for step in range(400)]
    assert [len(batch) for batch in _batches(small)] == [498, 498, 204]
    assert list(_batches([[1] * 700])) == [[1] * 700]


def test_a_run_whose_making_was_not_heard_of_is_found_again(sqlite: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    create, made = sqlite._client_without_retries.create_run, []

    def lose_the_answer(*arguments: Any, **options: Any) -> Any:
        made.append(create(*arguments, **options).info.run_id)
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(sqlite._client_without_retries, "create_run", lose_the_answer)
    assert [sqlite.start_run("train", {}, origin="lost")] == made
    monkeypatch.undo()
    assert [sqlite.start_run("train", {}, origin="lost")] == made
    assert sqlite.start_run("train", {}, origin="other") not in made


def test_an_experiment_that_was_deleted_is_restored(sqlite: Tracking) -> None:
    run_id = sqlite.start_run("train", {})
    workspace = Path(sqlite.uri.removeprefix("sqlite:///")).parent
    sqlite.client.delete_experiment(sqlite._experiment_id)
    assert Tracking(workspace, "tried").resume_run(run_id)
    sqlite.client.delete_run(run_id)
    assert not sqlite.resume_run(run_id)
    assert not sqlite.resume_run("f" * 32)


def test_no_login_gets_into_the_store(sqlite: Tracking) -> None:
    secret = "https://alice:PW@host/rows.jsonl?sig=PW"
    run_id = sqlite.start_run("train", {"at start": secret})
    sqlite.tag(run_id, {"later": secret})
    sqlite.describe(run_id, f"trained on {secret}")
    sqlite.log_parameters(run_id, {"data": {"train": [secret]}})
    sqlite.log_dataset(run_id, "train", "d" * 64, secret, 3, "train")
    assert "PW" not in str(sqlite.client.get_run(run_id).to_dictionary())
    assert sqlite.client.get_run(run_id).data.tags["later"] == "https://host/rows.jsonl?sig=***"


def test_a_failure_ends_the_run_and_an_absence_leaves_it(sqlite: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    def status_after(error: BaseException) -> str:
        run_id = sqlite.start_run("train", {})
        with pytest.raises(type(error)), sqlite.open_run(run_id):
            raise error
        return str(sqlite.client.get_run(run_id).info.status)

    assert status_after(ValueError("no")) == "FAILED"
    assert status_after(KeyboardInterrupt()) == "KILLED"
    assert status_after(TrackingAwayError("away")) == "RUNNING"
    monkeypatch.setattr(stopping, "requested", lambda: signal.SIGTERM)
    assert status_after(ValueError("a worker that was killed")) == "KILLED"
    monkeypatch.undo()


def test_the_run_of_a_process_that_ends_without_unwinding_is_killed(sqlite: Tracking) -> None:
    run_id = sqlite.start_run("train", {})
    with sqlite.open_run(run_id):
        (duty,) = stopping._stop.duties
        duty()
        assert sqlite.client.get_run(run_id).info.status == "KILLED"
    assert not stopping._stop.duties


def test_a_run_of_another_store_is_not_resumed(sqlite: Tracking) -> None:
    assert not sqlite.resume_run("0" * 32)
    assert sqlite.page("0" * 32) is None


def test_a_run_is_linked_within_mlflows_pages(sqlite: Tracking) -> None:
    run_id = sqlite.start_run("train", {})
    experiment = sqlite.client.get_experiment_by_name("tried").experiment_id
    assert sqlite.page(run_id) == f"#/experiments/{experiment}/runs/{run_id}"


def test_a_dataset_carries_the_digest_of_its_whole_content(sqlite: Tracking) -> None:
    run_id = sqlite.start_run("train", {})
    for _ in range(2):
        sqlite.log_dataset(run_id, "rows", "ab" * 32, "rows.jsonl", 7, "training")
    (given,) = sqlite.client.get_run(run_id).inputs.dataset_inputs
    assert given.dataset.digest == "ab" * 18
    assert json.loads(given.dataset.profile) == {"num_rows": 7, "sha256": "ab" * 32}
    assert given.tags[0].value == "training"


def test_a_server_that_is_not_there_is_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(WorkspaceError, match=r"at http://127.0.0.1:9 cannot be used: connection refused; start"):
        Tracking(tmp_path, "tried")


@pytest.mark.processes
def test_metrics_wait_for_a_database_that_is_away(on_postgres: Tracking, database: Postgres) -> None:
    """On PostgreSQL, behind a server: parameters, a resumed run, a curve through an outage, a version in the registry."""
    tracking, said = on_postgres, []
    run_id = tracking.start_run("train", {"kasa.stage": "train"}, origin="one")
    tracking.log_parameters(run_id, {"train": {"learning_rate": 0.1}})
    delivery = Delivery(tracking, run_id, "loss", said.append)
    delivery.offer(journal(1, 5))
    delivery.attempt()
    database.stop()
    delivery.offer(journal(6, 9))
    pauses = [delivery.attempt() for _ in range(3)]
    assert pauses == [0.5, 1, 2]
    assert len(said) == 1
    assert "metrics are kept for later" in said[0]
    back = threading.Timer(2, database.start)
    back.start()
    tracking.tag(run_id, {"kasa.status": "computed"})  # waits
    back.join()
    with delivering(delivery):
        delivery.offer(journal(8, 12))
    assert "takes metrics again" in said[-1]
    assert_steps_once(tracking, run_id, journal(1, 12))

    again = Tracking(Path("unused"), "tried")
    assert again.start_run("train", {}, origin="one") == run_id
    assert again.resume_run(run_id)
    assert again.deliver(run_id, "loss", journal(1, 14, delay_s=60)) == 14
    assert_steps_once(again, run_id, journal(1, 14))
    again.end_run(run_id)
    found = again.client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"train.learning_rate": "0.1"}
    assert found.data.tags["kasa.status"] == "computed"

    registry = again.retrying(Registry(Path("unused")))
    registry.client.create_registered_model("model")
    version = registry.client.create_model_version("model", f"runs:/{run_id}/model", run_id)
    registry.client.set_registered_model_alias("model", "champion", version.version)
    champion = registry.champion("model")
    assert champion is not None
    assert champion.version == "1"
