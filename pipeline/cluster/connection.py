"""The connection to Ray: a cluster that RAY_ADDRESS names, or one started on this machine for the time of a run.

Ray is imported and connected to when the first task or training worker is about to run. A run that finds everything made
already does without it.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core import stopping
from pipeline.core.errors import ClusterError, cause_line
from pipeline.core.machine import GIB

_ROOT = Path(__file__).resolve().parents[2]

# Ray reads these when it is imported.
_DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # `report` blocks until the controller's next poll, which by default comes about every 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Its workers get these through the runtime environment. One BLAS thread per process: several processes on one machine, each
# with a pool of threads of its own, would spin against each other.
_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

# Ray allows a node that it starts 30 s to come up. On a machine too busy for that the start is repeated, so often in all.
_STARTS = 3

# A head that refuses so many connections in a row is dead.
_HEAD_CHECK_S, _HEAD_MISSES = 1.0, 3


@contextmanager
def ray_cluster(
    workspace: Path, cpus: float, gpus: int, on_connected: Callable[[dict[str, str]], None] = lambda facts: None
) -> Iterator[None]:
    """During the block tasks and training workers can be run. The first one to run opens the connection (`ensure_connected`).

    Args:
        workspace: Its folder keeps the token of a Ray that is started here.
        cpus: CPU cores that the run needs at once.
        gpus: GPUs that the run needs at once.
        on_connected: Called with facts about the cluster (`_facts`) once the connection is open.
    """
    with ExitStack() as stack:
        connection = _Connection(stack, workspace, cpus, gpus, on_connected)
        _connections.append(connection)
        try:
            yield
        finally:
            _connections.remove(connection)


def ensure_connected() -> None:
    """Open the connection of the surrounding `ray_cluster` block if it is not open yet.

    Raises:
        ClusterError: Ray does not start, RAY_ADDRESS cannot be reached, or the cluster is smaller than the run needs.
    """
    _connections[-1].ensure()
    stopping.keep_handlers()


def cluster_capacity() -> tuple[float, int]:
    """(CPU cores, GPUs) of the whole cluster. Connects to it."""
    ensure_connected()
    import ray

    resources = ray.cluster_resources()
    return float(resources.get("CPU", 0)), int(resources.get("GPU", 0))


@dataclass
class _Connection:
    """A connection to Ray that is opened on demand and closed with `stack`."""

    stack: ExitStack
    workspace: Path
    cpus: float
    gpus: int
    on_connected: Callable[[dict[str, str]], None]
    is_open: bool = False
    opening: threading.Lock = field(default_factory=threading.Lock)

    def ensure(self) -> None:
        with self.opening:
            if not self.is_open:
                for starts_left in reversed(range(_STARTS)):
                    try:
                        self._open()
                        break
                    except _SlowStartError as error:
                        if not starts_left:
                            raise ClusterError(
                                f"Ray did not start on this machine in {_STARTS} attempts of 30 s each: it is too busy; "
                                "end other programs, then the same command resumes from here"
                            ) from error
                self.is_open = True
                self.on_connected(_facts())

    def _open(self) -> None:
        with ExitStack() as opened:
            # Linux kills the processes of Ray together with the thread that started them, and a stage may run in a thread that
            # ends before the run. So a thread of the connection's own starts Ray.
            starter, over = ThreadPoolExecutor(1, "ray"), threading.Event()

            def close() -> None:
                if not _left_to_the_end():
                    over.set()
                    starter.shutdown()

            opened.callback(close)
            starting = starter.submit(opened.enter_context, _connected(self.workspace, self.cpus, self.gpus))
            starter.submit(over.wait)
            starting.result()
            self.stack.enter_context(opened.pop_all())


def _left_to_the_end() -> bool:
    """Whether Ray is left as it is: what stops this process kills a Ray of its own, workers and all, and a cluster notices."""
    return bool(stopping.requested()) and stopping.KILLS_BENEATH


class _SlowStartError(Exception):
    """A node that Ray started did not come up in time."""


# Global, as Ray's own connection is.
_connections: list[_Connection] = []


@contextmanager
def _connected(workspace: Path, cpus: float, gpus: int) -> Iterator[None]:
    os.environ.update({name: value for name, value in _DRIVER_ENVIRONMENT.items() if name not in os.environ})
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # A Ray that is started here demands a token, and by default keeps it in the home folder, where every later cluster of
        # this user would demand it too.
        token = workspace.resolve() / ".ray" / "auth_token"
        token.parent.mkdir(parents=True, exist_ok=True)
        if not token.exists():
            token.write_text(uuid.uuid4().hex, encoding="utf-8")
            token.chmod(0o600)
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    import ray

    options: dict[str, Any] = {"num_cpus": max(os.cpu_count() or 1, int(cpus + 0.999)), "include_dashboard": False}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": _WORKER_ENVIRONMENT},
            job_config=_job_config(),
            **({} if address else options),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(f"cannot use the Ray cluster at {address or 'this machine'}: {cause_line(error)}") from error
    except Exception as error:  # Ray has no type of its own for a slow start
        if "timed out during startup" not in str(error):
            raise
        raise _SlowStartError(str(error)) from error
    done = threading.Event()
    if not address:
        _end_with_head(ray.get_runtime_context().gcs_address, done)
    try:
        _check_size(ray.cluster_resources(), cpus, gpus)
        yield
    finally:
        done.set()
        if not _left_to_the_end():
            ray.shutdown()


def _job_config() -> Any:
    """What Ray does with the import path of the workers: this package's root comes first.

    Ray would put the current folder, and that of the command's script, before all else: a file named `pipeline.py` or
    `datasets.py` in it would be imported instead of the package.
    """
    from ray.job_config import JobConfig

    class OwnPath(JobConfig):
        def _get_proto_job_config(self) -> Any:
            # An installed package is found without help, and its folder must not come before the standard library.
            self._py_driver_sys_path = [] if _ROOT.name in ("site-packages", "dist-packages") else [str(_ROOT)]
            return super()._get_proto_job_config()

    return OwnPath()


def _facts() -> dict[str, str]:
    """Facts about the connected cluster: `address`, `nodes`, `cpus`, `gpus`, `memory_gib`, `ray` (its version)."""
    import ray

    resources = ray.cluster_resources()
    return {
        "address": os.environ.get("RAY_ADDRESS") or "local",
        "nodes": str(sum(node["Alive"] for node in ray.nodes())),
        "cpus": f"{resources.get('CPU', 0):g}",
        "gpus": f"{resources.get('GPU', 0):g}",
        "memory_gib": f"{resources.get('memory', 0) / GIB:.1f}",
        "ray": ray.__version__,
    }


def _end_with_head(address: str, done: threading.Event) -> None:
    """End this process soon after the head of a Ray started here has died, unless `done` is set. Nothing restarts that head.

    Ray itself would try to reach it for a minute and then end the process from within, where no exception can be caught.
    """
    host, port = address.rsplit(":", 1)

    def watch() -> None:
        misses = 0
        while not done.wait(_HEAD_CHECK_S) and misses < _HEAD_MISSES:
            try:
                socket.create_connection((host, int(port)), timeout=_HEAD_CHECK_S).close()
                misses = 0
            except TimeoutError:
                pass  # a machine that is busy; a port without a process refuses at once
            except OSError:
                misses += 1
        if not (done.is_set() or stopping.requested()):
            print("failed: Ray's head process died; the same command resumes from here", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _check_size(available: dict[str, float], cpus: float, gpus: int) -> None:
    if available.get("CPU", 0) < cpus:
        raise ClusterError(
            f"the run needs {cpus:g} CPU cores at once, the cluster has {available.get('CPU', 0):g}; "
            "lower train.workers, train.cpus_per_worker or evaluate.workers"
        )
    if available.get("GPU", 0) < gpus:
        raise ClusterError(
            f"the run needs {gpus} GPUs at once, the cluster has {available.get('GPU', 0):g}; "
            "lower train.workers and evaluate.workers, or set train.gpu=false"
        )
