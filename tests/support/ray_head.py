"""A Ray cluster of one node on this machine, as `ray start --head` makes it: with a dashboard, a token and free ports."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.core.machine import connects
from tests.support.processes import beneath, end_all

_START_S = 120.0
_PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "runtime-env-agent-port",
    "ray-client-server-port",
    "node-manager-port",
    "object-manager-port",
)


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        address: of its dashboard, which takes jobs.
        environment: what a client needs to be let in.
        process: `ray start --head --block`, which everything else runs beneath.
    """

    address: str
    environment: dict[str, str]
    process: subprocess.Popen[str]

    def job_drivers(self, module: str) -> list[psutil.Process]:
        """The processes `python -m MODULE` of jobs, without the shells that started them."""
        return [one for one in beneath(self.process, module) if "python" in one.name()]


@contextmanager
def ray_head(cpus: int) -> Iterator[Head]:
    """A head for the time of the block; it is ended by its own process, so no other Ray on the machine notices.

    Raises:
        RuntimeError: it does not start; with what it said.
    """
    # Sockets in it must have short paths, shorter than a test's own folder gives.
    folder = Path(tempfile.mkdtemp(prefix="kh", dir="/tmp"))
    token = folder / "token"
    token.write_text(uuid.uuid4().hex, encoding="utf-8")
    token.chmod(0o600)
    client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    options = {**ports, "num-cpus": cpus, "temp-dir": folder / "r", "min-worker-port": 0, "max-worker-port": 0}
    options |= {"dashboard-host": "127.0.0.1", "include-dashboard": "true"}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    log = folder / "head.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [_ray(), "start", "--head", "--block", *arguments],
            cwd=folder,
            env={**plain_environment(), **client}
            | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "DS_ACCELERATOR": "cpu"},
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    head = Head(f"http://127.0.0.1:{ports['dashboard-port']}", client, process)
    try:
        _wait_until_up(head, ports["dashboard-port"], ports["dashboard-agent-listen-port"], log)
        yield head
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def ray_job_submit(head: Head, folder: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Ray's own `ray job submit ARGUMENTS`, in `folder`."""
    return subprocess.run(
        [_ray(), "job", "submit", "--address", head.address, *arguments],
        cwd=folder,
        env={**plain_environment(), **head.environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def plain_environment() -> Mapping[str, str]:
    """The surroundings without settings of Ray, MLflow and Python's path; `python` is this interpreter."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_", "KASA_", "PYTHONPATH"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_until_up(head: Head, dashboard: int, agent: int, log: Path) -> None:
    # Jobs are started by the node's agent, which comes up after the dashboard.
    deadline = time.monotonic() + _START_S
    while connects("127.0.0.1", dashboard) or connects("127.0.0.1", agent):
        if head.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no Ray head: {log.read_text(encoding='utf-8', errors='replace')[-3000:]}")
        time.sleep(0.1)


def _end(process: subprocess.Popen[str]) -> None:
    """The process and all beneath it; jobs' drivers live in sessions of their own and would outlast it."""
    below = beneath(process) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    end_all(below)
