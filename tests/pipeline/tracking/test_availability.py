"""Which errors mean that a store is unavailable, as MLflow's client really raises them, and how long a call is retried."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.core.errors import TrackingAwayError, WorkspaceError
from pipeline.tracking.availability import RETRY_VARIABLE, if_there, retry, retry_limit_s, retrying, unavailable_reason


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers every request with `status`; 0 answers too late, -1 hangs up."""

    status = 200
    code = "RESOURCE_DOES_NOT_EXIST"

    def do_GET(self) -> None:
        if self.status == 0:
            time.sleep(2)
        if self.status <= 0:
            self.close_connection = True
            return
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(json.dumps({"error_code": self.code, "message": "so it is"}).encode() if self.code else b"no")

    do_POST = do_PUT = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()


def error_of(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (500, "it answers with error 500"),
        (502, "it answers with error 502"),
        (503, "it answers with error 503"),
        (429, "it answers with error 429"),
        (0, "no answer in time"),
        (-1, "connection lost"),
        (400, None),
        (401, None),
        (403, None),
        (404, None),
    ],
)
def test_what_a_server_answers(server: str, status: int, why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answer, "status", status)
    assert unavailable_reason(error_of(lambda: MlflowClient(server).get_run("a" * 32))) == why


@pytest.mark.parametrize(("status", "why"), [(503, "it answers with error 503"), (403, None)])
def test_an_artifact_that_is_not_taken(
    server: str, status: int, why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    monkeypatch.setattr(Answer, "status", status)
    (tmp_path / "file").write_text("content")
    store = MlflowArtifactsRepository("mlflow-artifacts:/1/2/artifacts", tracking_uri=server)
    assert unavailable_reason(error_of(lambda: store.log_artifact(str(tmp_path / "file")))) == why


@pytest.mark.parametrize(
    ("status", "code", "is_absence"),
    [
        (404, "RESOURCE_DOES_NOT_EXIST", True),
        (404, "", False),
        (403, "PERMISSION_DENIED", False),
        (401, "", False),
        (400, "INVALID_PARAMETER_VALUE", False),
        (500, "INTERNAL_ERROR", False),
    ],
)
def test_absence_is_one_answer_among_others(
    server: str, status: int, code: str, is_absence: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answer, "status", status)
    monkeypatch.setattr(Answer, "code", code)

    def ask() -> object:
        return if_there(lambda: MlflowClient(server).get_registered_model("m"))

    if is_absence:
        assert ask() is None
    else:
        error_of(ask)


@pytest.mark.parametrize(("status", "code"), [(403, "PERMISSION_DENIED"), (401, ""), (403, "")])
def test_a_server_that_refuses_is_the_users_to_mend(
    server: str, status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answer, "status", status)
    monkeypatch.setattr(Answer, "code", code)
    address = server.replace("http://", "http://alice:PW@")
    with pytest.raises(WorkspaceError, match=r"refuses access .*MLFLOW_TRACKING_USERNAME") as refused:
        retry(lambda: MlflowClient(address).get_registered_model("m"), "there", 60)
    assert "PW" not in str(refused.value)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert (
        unavailable_reason(error_of(lambda: MlflowClient("http://127.0.0.1:9").get_run("a" * 32)))
        == "connection refused"
    )
    unknown = error_of(lambda: MlflowClient("http://nobody.invalid").get_run("a" * 32))
    assert unavailable_reason(unknown) == "its name is not known"


def test_databases_that_are_busy_or_full() -> None:
    import sqlite3

    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
    from sqlalchemy.exc import OperationalError

    busy = MlflowException("busy", error_code=TEMPORARILY_UNAVAILABLE)
    busy.__cause__ = OperationalError("INSERT", {}, sqlite3.OperationalError("database is locked"))
    full = MlflowException("full", error_code=TEMPORARILY_UNAVAILABLE)
    full.__cause__ = OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))
    assert unavailable_reason(busy) == "its database is busy or away"
    assert unavailable_reason(full) is None


@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError(28, "No space left"), PermissionError("no"), KeyError("x")]
)
def test_other_errors_mean_something_else(error: Exception) -> None:
    assert unavailable_reason(error) is None


@pytest.mark.parametrize("says", ["duplicate column name: workspace", "table runs already exists", "no such column: x"])
def test_a_broken_database_is_not_busy(says: str) -> None:
    import sqlite3

    from sqlalchemy.exc import OperationalError

    broken = OperationalError("ALTER TABLE", {}, sqlite3.OperationalError(says))
    assert unavailable_reason(broken) is None


def test_an_error_met_while_handling_an_absence_is_itself() -> None:
    def call() -> None:
        try:
            raise ConnectionRefusedError("refused")
        except ConnectionRefusedError:
            raise ValueError("our own mistake")  # noqa: B904

    assert unavailable_reason(error_of(call)) is None


class Clock:
    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Store:
    """Away for its first `absences` calls."""

    name = "store"

    def __init__(self, absences: int) -> None:
        self.calls, self.absences = 0, absences

    def add(self, one: int, two: int = 0) -> int:
        self.calls += 1
        if self.calls <= self.absences:
            raise ConnectionRefusedError("Connection refused")
        return one + two


def try_add(store: Store, limit_s: float) -> tuple[int, list[str], Clock]:
    clock, said = Clock(), []
    result = retry(lambda: store.add(1, two=2), "http://there", limit_s, clock.sleep, lambda: clock.now, said.append)
    return result, said, clock


def test_a_call_waits_says_so_once_and_goes_on() -> None:
    result, said, clock = try_add(Store(5), 60)
    assert result == 3
    assert clock.slept == [0.5, 1, 2, 4, 8]
    assert said == [
        "MLflow at http://there is away (connection refused); waiting for it, 60 s at most",
        "MLflow at http://there is back after 16 s",
    ]


def test_a_connection_lost_once_is_not_worth_a_word() -> None:
    assert try_add(Store(1), 60)[:2] == (3, [])


def test_pauses_do_not_grow_without_end_and_the_limit_is_kept() -> None:
    store = Store(10**6)
    with pytest.raises(TrackingAwayError, match=r"away for 60 s \(connection refused\).*the same command again"):
        try_add(store, 60)
    assert store.calls == 9


def test_other_errors_are_not_tried_again() -> None:
    store = Store(0)
    with pytest.raises(TypeError):
        retry(lambda: store.add("1"), "there", 60)  # type: ignore[arg-type]
    assert store.calls == 1


def test_what_somebody_else_set_in_the_same_moment_is_set_again() -> None:
    class Client:
        calls = 0

        def set_tag(self, value: str) -> str:
            self.calls += 1
            if self.calls == 1:
                raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: tags.key, tags.run_uuid")
            return value

        create_run = set_tag

    assert retrying(Client(), "here", 0).set_tag("value") == "value"
    with pytest.raises(MlflowException):
        retrying(Client(), "here", 0).create_run("value")


def test_an_object_whose_calls_are_retried_keeps_its_face() -> None:
    store = retrying(Store(1), "there", 60)
    assert store.add(1, two=2) == 3
    assert store.calls == 2
    assert store.name == "store"


def test_the_limit_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RETRY_VARIABLE, raising=False)
    assert retry_limit_s() == 600
    monkeypatch.setenv(RETRY_VARIABLE, "2.5")
    assert retry_limit_s() == 2.5
    for wrong in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv(RETRY_VARIABLE, wrong)
        with pytest.raises(WorkspaceError, match=RETRY_VARIABLE):
            retry_limit_s()
