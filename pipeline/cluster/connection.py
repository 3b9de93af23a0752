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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core import stopping
from pipeline.core.errors import ClusterError, cause_line
from pipeline.core.files import make_once
from pipeline.core.machine import GIB, TIMEOUT_S, Finding, connects, host_and_port
from pipeline.core.redaction import redacted

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

# The default port of each kind of address.
_RAY_PORTS = {"": 6379, "ray": 10001}
# What only Ray's head answers; proxies and other services take a connection, too.
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_NO_RAY = "something answers there that is no Ray"
# How long a cluster's head may take to say a word.
_ANSWER_S = 10.0

# A Ray of the run's own, its dashboard's agent, gloo and NCCL listen on loopback alone. Ray decides by the node's address,
# which it takes from the network card unless this variable, made for other systems, forbids clusters.
_LOCAL_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")

# The longest path of a socket, and what Ray appends to its temporary folder for one.
_SOCKET_BYTES = 107
_SOCKET_NAME = "/ray/session_2026-11-29_18-31-54_123456_4194304/sockets/plasma_store.10"


def cluster_address() -> str | None:
    """The cluster that RAY_ADDRESS names; None where a run starts a Ray of its own on this machine."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def check_address(address: str | None, timeout_s: float = TIMEOUT_S) -> Finding:
    """Check that a Ray takes connections at the address RAY_ADDRESS.

    A head that does not answer would be waited for without end. What answers and is no Ray (a dashboard, another service)
    is found out by gRPC, which Ray speaks.
    """
    if not address or address == "local":
        return Finding("Ray cluster", "ok", "RAY_ADDRESS not set: each run starts a Ray of its own on this machine")
    if address == "auto":
        return Finding("Ray cluster", "ok", "RAY_ADDRESS=auto: the Ray that already runs on this machine")
    shown = f"RAY_ADDRESS={redacted(address)}"
    scheme = address.partition("://")[0] if "://" in address else ""
    if scheme not in _RAY_PORTS:
        remedy = "write HEAD:6379 (`kasa submit --address` takes the http:// address of a dashboard), or unset it"
        return Finding("Ray cluster", "fail", f"{shown} is no address of a Ray head", remedy)
    target = host_and_port(address, _RAY_PORTS[scheme])
    if target is None:
        return Finding("Ray cluster", "fail", f"{shown} names no host", "write HEAD:6379, or unset it")
    problem = connects(*target, timeout_s) or _is_no_ray(*target, scheme, timeout_s)
    if problem is None:
        return Finding("Ray cluster", "ok", f"{shown} takes connections")
    remedy = "start that cluster (`ray start --head`), correct RAY_ADDRESS, or unset it to run on this machine"
    return Finding("Ray cluster", "fail", f"{shown}: {problem}", remedy)


def _is_no_ray(host: str, port: int, scheme: str, timeout_s: float) -> str | None:
    """Why nothing at this port can be a Ray; None if it may be one."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return None  # it wants a certificate before it says a word
    import grpc

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            if scheme:
                grpc.channel_ready_future(channel).result(timeout=timeout_s)
            else:
                channel.unary_unary(_ALIVE)(b"", timeout=timeout_s)
        except grpc.FutureTimeoutError:
            return _NO_RAY
        except grpc.RpcError as error:
            code = error.code()
            silent = code in (
                grpc.StatusCode.UNIMPLEMENTED,
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            )
            return _NO_RAY if silent else None  # one that wants a token is a Ray
    return None


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
    address = cluster_address()
    _set_environment(_DRIVER_ENVIRONMENT | ({} if address else _LOCAL_ENVIRONMENT))
    if address:
        answer = check_address(address, _ANSWER_S)
        if answer.status == "fail":
            raise ClusterError(f"{answer.detail}; {answer.remedy}")
        options: dict[str, Any] = {"runtime_env": {"env_vars": _WORKER_ENVIRONMENT}}
    else:
        # A Ray that is started here demands a token, and by default keeps it in the home folder, where every later cluster of
        # this user would demand it too.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_own_token(workspace))
        options = {
            "num_cpus": max(os.cpu_count() or 1, int(cpus + 0.999)),
            "include_dashboard": False,
            "runtime_env": {"env_vars": _WORKER_ENVIRONMENT | _loopback()},
            **_short_folder(),
        }
    import ray

    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            job_config=_job_config(),
            **options,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = redacted(address) if address else "this machine"
        raise ClusterError(f"cannot use the Ray cluster at {where}: {cause_line(error)}") from error
    except Exception as error:  # Ray has no type of its own for a slow start
        if "timed out during startup" not in str(error):
            raise
        raise _SlowStartError(str(error)) from error
    done = threading.Event()
    if not address:
        _end_with_head(ray.get_runtime_context().gcs_address, done)
    try:
        check_size(ray.cluster_resources(), cpus, gpus)
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


def _set_environment(variables: dict[str, str]) -> None:
    """Set the variables that the user has not set."""
    os.environ.update({name: value for name, value in variables.items() if name not in os.environ})


def _loopback() -> dict[str, str]:
    """Variables by which process groups keep to this machine's loopback interface."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {variable: names[0] for variable in _INTERFACES if names and variable not in os.environ}


def _own_token(workspace: Path) -> Path:
    """The file with the token of every Ray that is started for this workspace; nobody else may read it at any time."""

    def make(new: Path) -> None:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(uuid.uuid4().hex)

    return make_once(workspace.resolve() / ".ray" / "auth_token", make)


def _short_folder() -> dict[str, str]:
    """Another temporary folder for Ray where its sockets would have too long a name in the usual one."""
    usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return {"_temp_dir": "/tmp/ray"} if len(os.fsencode(usual + _SOCKET_NAME)) > _SOCKET_BYTES else {}


def _facts() -> dict[str, str]:
    """Facts about the connected cluster: `address`, `nodes`, `cpus`, `gpus`, `memory_gib`, `ray` (its version)."""
    import ray

    resources = ray.cluster_resources()
    return {
        "address": redacted(cluster_address() or "local"),
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


def check_size(available: Mapping[str, float], cpus: float, gpus: int) -> None:
    """Refuse a run that needs more CPU cores or GPUs at once than there are.

    Raises:
        ClusterError: naming both numbers.
    """
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
