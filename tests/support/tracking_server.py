"""A real `mlflow server` on loopback that hands artifacts through itself; to be killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.core.files import Record
from tests.support.processes import wait_for

START_PATIENCE_S = 180.0
# Its queue of jobs is processes of their own, which nobody needs here.
_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


class TrackingServer:
    """A server on a port of its own, the same after every start.

    Attributes:
        uri: for MLFLOW_TRACKING_URI.
    """

    def __init__(self, folder: Path, backend: str | None = None) -> None:
        """`folder` takes its artifacts, its log and, unless `backend` names a database, an SQLite file."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._backend = folder, backend or f"sqlite:///{folder / 'server.db'}"
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            RuntimeError: it ended, or did not answer in time; with the end of its log.
        """
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1",
            "--backend-store-uri", self._backend, "--serve-artifacts",
            "--artifacts-destination", str(self._folder / "artifacts"),
        ]  # fmt: skip
        surroundings = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        log = self._folder / "server.log"
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                env=surroundings | _ENVIRONMENT,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_PATIENCE_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"mlflow server did not start: {log.read_text(encoding='utf-8')[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        if self._process:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def tracking_server(folder: Path, backend: str | None = None) -> Iterator[TrackingServer]:
    """A server that runs within the block."""
    server = TrackingServer(folder, backend)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def outage(
    server: TrackingServer,
    process: subprocess.Popen[str],
    last_step: Callable[[], int],
    after: int,
    is_over: Callable[[], bool],
    patience_s: float,
) -> int:
    """Kill the server once `last_step()` of a training has reached `after`, and start it again when `is_over()`.

    Returns the step at which the server died.

    Raises:
        RuntimeError, TimeoutError: as `wait_for`.
    """
    wait_for(lambda: last_step() >= after, process, patience_s)
    server.kill()
    died_at = last_step()
    wait_for(is_over, process, patience_s)
    server.start()
    return died_at


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def curve_faults(client: Any, run_id: str, journal: Sequence[Record]) -> dict[str, int]:
    """What differs between a training's curves in MLflow and its journal: points `missing`, `repeated`, `out_of_order`
    and `wrong`, over all metrics of all steps."""
    faults = dict.fromkeys(("missing", "repeated", "out_of_order", "wrong"), 0)
    expected: dict[str, dict[int, float]] = {}
    for record in journal:
        for name in record.keys() - {"step", "steps", "time_s"}:
            expected.setdefault(name, {})[record["step"]] = record[name]
    for name, values in expected.items():
        points = client.get_metric_history(run_id, name)
        steps = [point.step for point in sorted(points, key=lambda point: point.timestamp)]
        faults["missing"] += len(values.keys() - set(steps))
        faults["repeated"] += len(steps) - len(set(steps))
        faults["out_of_order"] += steps != sorted(steps)
        faults["wrong"] += sum(point.step not in values or values[point.step] != point.value for point in points)
    return faults
