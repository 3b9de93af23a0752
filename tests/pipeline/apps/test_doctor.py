"""The doctor's checks as tables, its probes against sockets of this process, and that it leaves no trace."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from packaging.requirements import Requirement

from pipeline.apps import doctor
from pipeline.apps.doctor import (
    check_compiler,
    check_cores,
    check_files,
    check_gpus,
    check_index,
    check_memory,
    check_packages,
    check_python,
    check_shared_memory,
    check_workspace,
    examine,
    installed_versions,
    pins,
)
from pipeline.cluster.connection import check_address
from pipeline.core import machine as reach
from pipeline.core.machine import (
    answers,
    connects,
    existing_parent,
    host_and_port,
    package_index,
    side_by_side,
)
from pipeline.tracking.server import check_store


class _Server(http.server.BaseHTTPRequestHandler):
    """Healthy on /health, forbidden on /closed/health, broken on /broken/..., missing elsewhere."""

    def do_GET(self) -> None:
        known = {"/health": 200, "/closed/health": 403}
        self.send_response(known.get(self.path, 500 if self.path.startswith("/broken") else 404))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(autouse=True)
def _no_proxy_and_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PIP_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_examination_is_quick_complete_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", server)
    monkeypatch.setattr(doctor, "visible_gpus", list)
    start = time.monotonic()
    found = examine(tmp_path / "not" / "there")
    assert time.monotonic() - start < 3
    names = [finding.name for finding in found]
    expected = [
        "Python",
        "packages",
        "CPU cores",
        "memory",
        "workspace",
        "GPU",
        "C++ compiler",
        "Ray cluster",
        "MLflow",
    ]
    assert [name for name in names if name in expected] == expected
    assert names[-3:] == ["package index", "/dev/shm", "open files"]
    assert list(tmp_path.iterdir()) == []
    for finding in found:
        assert "\n" not in finding.detail
        assert bool(finding.remedy) == (finding.status != "ok")


def test_a_hanging_probe_becomes_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_NETWORK_DEADLINE_S", 0.2)
    monkeypatch.setattr(doctor, "visible_gpus", list)
    monkeypatch.setattr(doctor, "check_index", lambda _: time.sleep(30))
    start = time.monotonic()
    index = next(finding for finding in examine(tmp_path) if finding.name == "package index")
    assert time.monotonic() - start < 2
    assert (index.status, index.detail) == ("warn", "no answer within 0.2 s")


def test_this_installation_is_the_pinned_one() -> None:
    requires_python, requirements = pins()
    assert requires_python == ">=3.11"
    assert {"torch", "deepspeed", "ray", "mlflow"} <= {pin.name for pin in requirements}
    assert [finding.status for finding in check_packages(requirements, installed_versions(requirements))] == ["ok"]


def test_packages_off_their_pins() -> None:
    required = [Requirement(line) for line in ("a==1.0", "b>=2", "c[x]==3", "d>=1,<2")]
    wrong_a, missing_c, rest = check_packages(required, {"a": "1.1", "b": "2.0+cpu", "d": "1.5rc1"})
    assert (wrong_a.name, wrong_a.status, wrong_a.detail) == ("a", "fail", "1.1, wanted ==1.0")
    assert (missing_c.detail, missing_c.remedy) == ("not installed, wanted ==3", "pip install 'c[x]==3'")
    assert rest.detail.startswith("2 of 4 as pinned")


@pytest.mark.parametrize(("version", "status"), [("3.10.9", "fail"), ("3.11.0", "ok"), ("3.14.0rc1", "ok")])
def test_python(version: str, status: str) -> None:
    assert check_python(version, ">=3.11").status == status


@pytest.mark.parametrize(("cores", "status"), [(1, "warn"), (2, "ok")])
def test_cores(cores: int, status: str) -> None:
    assert check_cores(cores).status == status


@pytest.mark.parametrize(
    ("gib", "status"), [((64.0, 4.0), "ok"), ((64.0, 3.9), "warn"), ((64.0, 1.9), "fail"), (None, "warn")]
)
def test_memory(gib: tuple[float, float] | None, status: str) -> None:
    assert check_memory(gib).status == status


def test_workspace_is_probed_at_its_nearest_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "a" / "b"
    assert existing_parent(deep) == tmp_path
    monkeypatch.setattr(doctor, "_free_gib", {tmp_path: 50.0}.get)
    assert check_workspace(deep).status == "ok"
    assert check_workspace(deep).detail.endswith("not made yet")
    assert not check_workspace(tmp_path).detail.endswith("not made yet")
    assert not deep.parent.exists()


@pytest.mark.parametrize(("free", "status"), [(5.0, "ok"), (4.9, "warn"), (0.9, "fail")])
def test_workspace_room(free: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_free_gib", lambda _: free)
    assert check_workspace(tmp_path).status == status


def test_workspace_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in check_workspace(file / "below").detail
    # Permissions mean nothing to root, which tests may run as.
    monkeypatch.setattr("os.access", lambda *_: False)
    refused = check_workspace(tmp_path / "x")
    assert (refused.status, refused.detail) == ("fail", f"{tmp_path} cannot be written")


def test_gpus() -> None:
    assert check_gpus([])[0].status == "ok"
    old, new = check_gpus([("Tesla T4", 15.0, (7, 5)), ("H100", 79.6, (9, 0))])
    assert (old.status, old.remedy) == ("warn", "set train.precision to fp32")
    assert (new.name, new.status, new.detail) == ("GPU 1", "ok", "H100, 79.6 GiB, compute capability 9.0, bf16")


def test_compiler_is_optional() -> None:
    assert check_compiler("/usr/bin/g++").detail == "/usr/bin/g++"
    assert check_compiler(None).status == "ok"


def test_ray_address(closed_port: int, server: str) -> None:
    alive = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    head, other = grpc.server(ThreadPoolExecutor(1)), grpc.server(ThreadPoolExecutor(1))
    head.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", {"CheckAlive": alive})]
    )
    port, other_port = (one.add_insecure_port("127.0.0.1:0") for one in (head, other))
    head.start()
    other.start()
    for address in (None, "", "local", "auto", f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        assert check_address(address).status == "ok", address
    assert "no Ray" in check_address(f"127.0.0.1:{other_port}").detail
    head.stop(None)
    other.stop(None)
    for no_ray in (server, server.removeprefix("http://")):
        assert check_address(no_ray).status == "fail", no_ray
    closed = check_address(f"127.0.0.1:{closed_port}")
    assert closed.status == "fail"
    assert str(closed_port) in closed.detail
    assert check_address("ray://").status == "fail"
    assert check_address("127.0.0.1:port").status == "fail"


def test_mlflow_server(server: str, closed_port: int) -> None:
    assert check_store(server).status == "ok"
    assert check_store(f"{server}/").status == "ok"
    assert check_store(f"{server}/closed").status == "warn"
    broken = check_store(f"{server}/broken")
    assert broken.status == "fail"
    assert "HTTP 500" in broken.detail
    assert check_store(f"http://127.0.0.1:{closed_port}").status == "fail"


def test_mlflow_stores(tmp_path: Path) -> None:
    assert check_store(None).status == "ok"
    assert check_store(f"sqlite:///{tmp_path}/mlflow.db").status == "ok"
    missing = check_store(f"sqlite:///{tmp_path}/no/mlflow.db")
    assert (missing.status, missing.remedy) == ("fail", f"mkdir -p {tmp_path}/no")
    assert check_store("./mlruns").status == "fail"
    assert check_store(f"file://{tmp_path}").status == "fail"
    away = check_store("postgresql+psycopg2://me:secret@127.0.0.1:9/x")
    assert away.status == "fail"
    assert "secret" not in away.detail
    assert check_store("databricks://profile").status == "warn"


def test_package_index(server: str, closed_port: int, tmp_path: Path) -> None:
    assert check_index(server).status == "ok"
    assert check_index(f"{server}/broken").status == "warn"
    assert check_index(f"http://127.0.0.1:{closed_port}").status == "warn"
    assert check_index(f"file://{tmp_path}").status == "ok"
    assert check_index(f"file://{tmp_path}/no").status == "warn"
    assert "secret" not in check_index(server.replace("http://", "http://me:secret@")).detail


def test_package_index_is_pips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach.Path, "home", lambda: tmp_path)
    config = tmp_path / "mine.conf"
    config.write_text("[global]\nindex-url = https://mirror.example/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert package_index() == "https://mirror.example/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://other.example/simple")
    assert package_index() == "https://other.example/simple"
    monkeypatch.delenv("PIP_INDEX_URL")
    config.write_text("no section\n")
    assert package_index() == "https://pypi.org/simple"


@pytest.mark.parametrize(("free", "status"), [(1.0, "ok"), (0.06, "warn"), (None, "ok")])
def test_shared_memory(free: float | None, status: str) -> None:
    assert check_shared_memory(free).status == status


@pytest.mark.parametrize(("limit", "status"), [(1024, "warn"), (4096, "ok"), (None, "ok")])
def test_open_files(limit: int | None, status: str) -> None:
    assert check_files(limit).status == status


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("host:1", ("host", 1)),
        ("host", ("host", 9)),
        ("ray://host:2/x", ("host", 2)),
        ("[::1]:3", ("::1", 3)),
        ("host:port", None),
        ("", None),
    ],
)
def test_host_and_port(address: str, expected: tuple[str, int] | None) -> None:
    assert host_and_port(address, 9) == expected


def test_probes_say_why_not(closed_port: int, server: str) -> None:
    assert "refused" in (connects("127.0.0.1", closed_port) or "").lower()
    assert answers(f"http://127.0.0.1:{closed_port}")[0] is None
    assert answers("no url")[0] is None
    assert answers(f"{server}/missing")[0] == 404


def test_a_service_that_speaks_no_http_is_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def babble() -> None:
            client, _ = listener.accept()
            client.recv(1000)
            client.sendall(b"SSH-2.0\r\n\r\n")
            client.close()

        thread = threading.Thread(target=babble)
        thread.start()
        status, reason = answers(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert status is None
    assert reason


def test_side_by_side_takes_as_long_as_the_slowest() -> None:
    start = time.monotonic()
    assert side_by_side([lambda: time.sleep(0.2) or 1, lambda: time.sleep(0.2) or 2], 5) == [1, 2]
    assert time.monotonic() - start < 0.39
