"""The one door to Ray: connect, run tasks, run training workers.

A laptop gets a Ray of its own for the time of a run; with RAY_ADDRESS set the same calls go to that cluster.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kasa.errors import KasaError
from pipeline.errors import ClusterError, WorkerError

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

# A head that did not answer so often in a row is dead.
_HEAD_CHECK_S, _HEAD_MISSES = 1.0, 3


@dataclass(frozen=True)
class Resources:
    """What one worker reserves: CPU cores, and a GPU or none."""

    cpus: float = 1
    gpu: bool = False


@contextmanager
def ray_cluster(workspace: Path, cpus: float, gpus: int) -> Iterator[None]:
    """Within the block Ray is connected and has at least `cpus` cores and `gpus` GPUs in all.

    Raises:
        ClusterError: RAY_ADDRESS cannot be reached, or the cluster is too small.
    """
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
        raise ClusterError(
            f"cannot use the Ray cluster at {address or 'this machine'}: {_first_line(error)}"
        ) from error
    done = threading.Event()
    if not address:
        _end_with_head(ray.get_runtime_context().gcs_address, done)
    try:
        _check_size(ray.cluster_resources(), cpus, gpus)
        yield
    finally:
        done.set()
        ray.shutdown()


def run_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    resources: Resources,
    on_result: Callable[[Item, Result], None] = lambda item, result: None,
    while_waiting: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Run `function` once for each item on the cluster, side by side; results in the items' order.

    `on_result` is called in this process as each finishes, `while_waiting` about twice a second. A task whose worker
    dies is tried again three times. The first exception ends the rest and is raised as it was in the worker.
    """
    import ray

    task = ray.remote(num_cpus=resources.cpus, num_gpus=1 if resources.gpu else 0, max_retries=3)(function)
    pending = {task.remote(item): index for index, item in enumerate(items)}
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
    function: Callable[[Any], None],
    job: Any,
    workers: int,
    resources: Resources,
    scratch: Path,
    max_failures: int,
    timeout_s: float,
) -> None:
    """Run `function(job)` in `workers` processes that share a torch process group; restart all of them when one dies.

    Args:
        scratch: a folder for Ray Train's own files, removed afterwards.
        max_failures: how many deaths are survived.
        timeout_s: how long one worker may wait for another in a collective operation.

    Raises:
        KasaError: a worker met a mistake that the user can mend.
        WorkerError: the workers died once more than `max_failures`; the message holds the first worker's error.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    trainer = TorchTrainer(
        function,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if resources.gpu else "gloo", timeout_s=int(timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=resources.gpu, resources_per_worker={"CPU": resources.cpus}
        ),
        # A name used before would resume that run's state in silence.
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=str(scratch.resolve()),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _worker_error(error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
            except OSError:
                misses += 1
        if not done.is_set():
            print("failed: Ray's head process died; the same command goes on from here", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _worker_error(error: Exception) -> Exception:
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        if isinstance(cause := getattr(failure, "cause", failure), KasaError):
            return cause
    for rank, failure in failures.items():
        return WorkerError(
            f"training worker {rank} failed: {_first_line(getattr(failure, 'cause', failure) or failure)}"
        )
    return WorkerError(f"training failed: {_first_line(error)}")


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
