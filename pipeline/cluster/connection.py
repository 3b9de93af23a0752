"""The one door to Ray: connect, run tasks, run training workers.

A laptop gets a Ray of its own for the time of a run; with RAY_ADDRESS set the same calls go to that cluster. Either way
Ray is there from its first use on: a run that finds everything made already does without.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeline.cluster.failures import error_of, in_words
from pipeline.core.errors import ClusterError, WorkerError, cause_line
from pipeline.core.journal import append_journal

Item = TypeVar("Item")
Result = TypeVar("Result")

# Set before Ray is imported, here and (through the runtime environment) in its workers.
_DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# One BLAS thread per process: processes side by side, each with its own pool of threads, would spin against each other.
_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

# Ray gives a node of its own 30 s to come up; on a machine too busy for that it is started anew, so often in all.
_STARTS = 3

# A head that did not answer so often in a row is dead.
_HEAD_CHECK_S, _HEAD_MISSES = 1.0, 3


@dataclass(frozen=True)
class Resources:
    """What one worker reserves: CPU cores, a GPU or none, and memory where its need is known (0: unknown)."""

    cpus: float = 1
    gpu: bool = False
    memory_bytes: int = 0


@dataclass(frozen=True)
class WorkerGroup:
    """Training processes that work together.

    Attributes:
        most, fewest: how many there are, and how many are enough to start or go on with while the cluster has no more.
        resources: of each.
        max_failures: how many failures are survived; nodes that are taken away with notice are not counted.
        timeout_s: how long one may wait for another in a collective operation.
    """

    most: int
    fewest: int
    resources: Resources
    max_failures: int
    timeout_s: float


@contextmanager
def ray_cluster(
    workspace: Path, cpus: float, gpus: int, on_connected: Callable[[dict[str, str]], None] = lambda facts: None
) -> Iterator[None]:
    """Within the block tasks and training workers can be run; the first to be run connects to Ray.

    `on_connected` is then called with facts about the cluster (`_facts`).

    That raises ClusterError where RAY_ADDRESS cannot be reached, or the cluster has less than `cpus` cores or `gpus` GPUs
    in all.
    """
    with ExitStack() as stack:
        connection = _Connection(stack, workspace, cpus, gpus, on_connected)
        _connections.append(connection)
        try:
            yield
        finally:
            _connections.remove(connection)


@dataclass
class _Connection:
    """To Ray, once somebody needs it; closed with the stack."""

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
                                "end other programs, then the same command goes on from here"
                            ) from error
                self.is_open = True
                self.on_connected(_facts())

    def _open(self) -> None:
        with ExitStack() as opened:
            # Linux kills Ray's processes with the thread that started them, and stages may run in threads of their own.
            starter = opened.enter_context(ThreadPoolExecutor(1, "ray"))
            connected = _connected(self.workspace, self.cpus, self.gpus)
            starter.submit(opened.enter_context, connected).result()
            self.stack.enter_context(opened.pop_all())


class _SlowStartError(Exception):
    """A node of Ray's did not come up in time."""


# As global as Ray's own connection.
_connections: list[_Connection] = []


@contextmanager
def _connected(workspace: Path, cpus: float, gpus: int) -> Iterator[None]:
    os.environ.update({name: value for name, value in _DRIVER_ENVIRONMENT.items() if name not in os.environ})
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # A Ray started here demands a token; keep it out of the user's home, where it would bind later clusters too.
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
            **({} if address else options),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(f"cannot use the Ray cluster at {address or 'this machine'}: {cause_line(error)}") from error
    except Exception as error:  # for this Ray has no type
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
        ray.shutdown()


def cluster_capacity() -> tuple[float, int]:
    """How many CPU cores and GPUs the cluster has in all; connects to it."""
    _connections[-1].ensure()
    import ray

    resources = ray.cluster_resources()
    return float(resources.get("CPU", 0)), int(resources.get("GPU", 0))


def _facts() -> dict[str, str]:
    """The cluster that is connected: `address`, `nodes`, `cpus`, `gpus`, `memory_gib`, `ray` (its version)."""
    import ray

    resources = ray.cluster_resources()
    return {
        "address": os.environ.get("RAY_ADDRESS") or "local",
        "nodes": str(sum(node["Alive"] for node in ray.nodes())),
        "cpus": f"{resources.get('CPU', 0):g}",
        "gpus": f"{resources.get('GPU', 0):g}",
        "memory_gib": f"{resources.get('memory', 0) / 2**30:.1f}",
        "ray": ray.__version__,
    }


def run_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    resources: Resources | Callable[[Item], Resources],
    on_result: Callable[[Item, Result], None] = lambda item, result: None,
    while_waiting: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Run `function` once for each item on the cluster, side by side, in this working directory; results in order.

    `on_result` is called in this process as each finishes, `while_waiting` about twice a second. A task whose worker
    dies is tried again three times. The first exception ends the rest and is raised as it was in the worker.

    Args:
        resources: what each reserves, or what an item does. No more memory is reserved than the largest node has: a task
            that needs more has that node to itself.
    """
    _connections[-1].ensure()
    import ray  # not before: it reads its settings when it is imported

    task = ray.remote(max_retries=3)(_here(function))
    nodes = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]

    def start(item: Item) -> Any:
        needed = resources(item) if callable(resources) else resources
        memory = min(needed.memory_bytes, max(nodes, default=0))
        return task.options(num_cpus=needed.cpus, num_gpus=1 if needed.gpu else 0, memory=memory or None).remote(item)

    pending = {start(item): index for index, item in enumerate(items)}
    results: dict[int, Result] = {}
    try:
        while pending:
            done, _ = ray.wait(list(pending), timeout=0.5)
            while_waiting()
            for reference in done:
                index = pending.pop(reference)
                results[index] = ray.get(reference)
                on_result(items[index], results[index])
    except ray.exceptions.RayTaskError as error:
        raise error.cause or error from None
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
    return [results[index] for index in range(len(items))]


def run_training_workers(
    function: Callable[[Any, Callable[[], bool]], None],
    job: Any,
    workers: WorkerGroup,
    scratch: Path,
    interruptions: Path,
) -> None:
    """Run `function(job, node_leaves)` in processes that share a torch process group; restart all when one dies.

    `node_leaves()` says whether this worker has heard that a node with one of them is about to be taken away.

    Args:
        scratch: a folder for Ray Train's own files, removed afterwards.
        interruptions: a journal; each failure that is survived, or ends it all, is appended as `{"interruption": TEXT}`.

    Raises:
        KasaError: a worker met a mistake that the user can mend.
        WorkerError: workers failed more often than is survived; the message names the worker that failed first.
    """
    _connections[-1].ensure()
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.callback import UserCallback
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    journal = interruptions.resolve()

    class Interruptions(UserCallback):
        failures = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            self.failures += 1
            count = f"failure {self.failures}; {workers.max_failures} are survived"
            append_journal(journal, [{"interruption": f"{in_words(worker_exceptions)} ({count})"}])

    resources = workers.resources
    run_here = _here(function)
    trainer = TorchTrainer(
        lambda config: run_here(config, _node_leaves),
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if resources.gpu else "gloo", timeout_s=int(workers.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=workers.most if workers.fewest == workers.most else (workers.fewest, workers.most),
            use_gpu=resources.gpu,
            resources_per_worker={"CPU": resources.cpus},
        ),
        # A name used before would resume that run's state in silence.
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=str(scratch.resolve()),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            callbacks=[Interruptions()],
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        raise error_of(error.worker_failures) from error
    except TrainingFailedError as error:
        raise WorkerError(f"training failed: {cause_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _here(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function` in this process's working directory, where the node has it: relative paths mean the same everywhere."""
    folder = Path.cwd()

    @functools.wraps(function)
    def run(*arguments: Any) -> Result:
        if folder.is_dir():
            os.chdir(folder)
        return function(*arguments)

    return run


def _node_leaves() -> bool:
    # The public function is a collective operation of Ray's own without a time-out, in which a hang would go unnoticed.
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def _end_with_head(address: str, done: threading.Event) -> None:
    """End this process soon after the head of a Ray of its own, unless `done`: nothing will bring that head back.

    Ray would try to reach it for a minute, then end the process from within, where no exception can be caught.
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
        if not done.is_set():
            print("failed: Ray's head process died; the same command goes on from here", file=sys.stderr, flush=True)
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
