"""Work on the Ray cluster: independent tasks, and training workers that share a torch process group.

Whoever starts tasks that journal what they have done follows the journals while they run. When a training worker fails, its
peers fail after it: only the first failure matters, and errors name that one.
"""

from __future__ import annotations

import functools
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

from kasa.errors import KasaError
from pipeline.cluster.connection import cluster_address, ensure_connected
from pipeline.core import stopping
from pipeline.core.console import ProgressBars
from pipeline.core.errors import WorkerError, cause_line
from pipeline.core.files import JournalTail, Record, append_journal

Item = TypeVar("Item")
Result = TypeVar("Result")

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "MemoryError", "OutOfMemory", "low on memory")
_REMEDY = "lower train.micro_batch_size, or set train.gradient_checkpointing or a higher ZeRO stage"

# Is handed what the journals have that it has not seen.
Follow = Callable[[Sequence[Record]], None]


@dataclass(frozen=True)
class Resources:
    """What one worker reserves: CPU cores, at most one GPU, and memory in bytes (0 if its need is unknown)."""

    cpus: float = 1
    gpu: bool = False
    memory_bytes: int = 0


@dataclass(frozen=True)
class WorkerGroup:
    """A group of training workers.

    Attributes:
        most: How many workers there are.
        fewest: How many are enough to start or resume with while the cluster has no more.
        resources: What each worker reserves.
        max_failures: How many failures are survived. Nodes that are taken away with notice do not count.
        timeout_s: How long a worker may wait for another in a collective operation.
    """

    most: int
    fewest: int
    resources: Resources
    max_failures: int
    timeout_s: float


def run_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    resources: Resources | Callable[[Item], Resources],
    on_result: Callable[[Item, Result], None] = lambda item, result: None,
    while_waiting: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Run `function` once for each item on the cluster, in parallel, in the working directory of this process.

    A task whose worker dies is retried three times. The first exception cancels the other tasks and is raised here as it
    was in the worker.

    Args:
        resources: What each task reserves, or a function of the item. A task never reserves more memory than the largest
            node has: one that needs more has that node to itself.
        on_result: Called in this process as each task finishes.
        while_waiting: Called in this process about twice a second.

    Returns:
        The results in the order of the items.
    """
    ensure_connected()
    import ray  # not at the top: Ray reads its environment variables when it is imported

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
            stopping.check()
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
    """Run `function(job, node_leaves)` in processes that share a torch process group. If one dies, all are restarted.

    Args:
        function: `node_leaves()` tells it whether a node with one of the workers is about to be taken away.
        scratch: A folder for Ray Train's own files. It is deleted afterwards.
        interruptions: A journal. Each failure, survived or not, is appended as `{"interruption": TEXT}`.

    Raises:
        KasaError: A worker met a mistake that the user can correct.
        WorkerError: Workers failed more often than is survived. The message names the worker that failed first.
    """
    ensure_connected()
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

    try:
        # In the main thread Ray Train would put a handler of its own before Ctrl-C, and leave it there.
        stopping.aside(_trainer(function, job, workers, scratch, interruptions).fit)
    except WorkerGroupError as error:
        raise _error_of(error.worker_failures) from error
    except TrainingFailedError as error:
        raise WorkerError(f"training failed: {cause_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _trainer(
    function: Callable[[Any, Callable[[], bool]], None],
    job: Any,
    workers: WorkerGroup,
    scratch: Path,
    interruptions: Path,
) -> Any:
    from ray.train.v2.api.callback import UserCallback
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    journal = interruptions.resolve()

    class Interruptions(UserCallback):
        failures = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            self.failures += 1
            count = f"failure {self.failures}; {workers.max_failures} are survived"
            append_journal(journal, [{"interruption": f"{_in_words(worker_exceptions)} ({count})"}])

    resources = workers.resources
    run_here = _here(function)
    return TorchTrainer(
        lambda config: run_here(config, _node_leaves),
        train_loop_config=job,
        torch_config=_process_group("nccl" if resources.gpu else "gloo", int(workers.timeout_s), scratch.resolve()),
        scaling_config=ScalingConfig(
            num_workers=workers.most if workers.fewest == workers.most else (workers.fewest, workers.most),
            use_gpu=resources.gpu,
            resources_per_worker={"CPU": resources.cpus},
        ),
        # A random name: Ray silently resumes the state of an earlier run of the same name.
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=str(scratch.resolve()),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            callbacks=[Interruptions()],
        ),
    )


def _process_group(backend: str, timeout_s: int, scratch: Path) -> Any:
    """How the workers find each other: on a cluster as Ray has it, on this machine through a file.

    torch's TCP store, which Ray sets up, listens on all interfaces and takes writes from anyone.
    """
    import ray
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend  # no public names

    if cluster_address():
        return TorchConfig(backend=backend, timeout_s=timeout_s)

    class MeetInFile(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            store = scratch / f"store-{uuid.uuid4().hex}"  # a new one for each start: a store remembers who was there
            store.parent.mkdir(parents=True, exist_ok=True)
            worker_group.execute(_set_torch_distributed_env_vars)
            size = len(worker_group)
            ray.get(
                [
                    worker_group.execute_single_async(rank, _meet, str(store), backend, rank, size, timeout_s)
                    for rank in range(size)
                ]
            )

    class OnThisMachine(TorchConfig):
        backend_cls = MeetInFile

    return OnThisMachine(backend=backend, timeout_s=timeout_s)


def _meet(store: str, backend: str, rank: int, size: int, timeout_s: int) -> None:
    """Make this process a member of the group, whose members find each other in the file `store`.

    Not by `init_method`: a path with a space or a semicolon is none as a `file://` address is read there.
    """
    from torch import distributed

    distributed.init_process_group(
        backend,
        store=distributed.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )


def _here(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function` in this process's working directory, if the node has it, so that relative paths mean the same there."""
    folder = Path.cwd()

    @functools.wraps(function)
    def run(*arguments: Any) -> Result:
        if folder.is_dir():
            os.chdir(folder)
        return function(*arguments)

    return run


def _node_leaves() -> bool:
    # Ray's public function for this is a collective operation without a time-out, in which a hang would go unnoticed.
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def _error_of(failures: Mapping[int, Exception]) -> KasaError | WorkerError:
    """The error to report if training ended with `failures`, by rank."""
    for failure in failures.values():
        if isinstance(cause := _cause(failure), KasaError):
            return cause
    return WorkerError(_in_words(failures))


def _in_words(failures: Mapping[int, Exception]) -> str:
    """One line on the failure that caused the others, with a remedy if one is known."""
    _, rank = min((_order(failure), rank) for rank, failure in failures.items())
    failure = failures[rank]
    cause = _cause(failure)
    if isinstance(cause, WorkerError | KasaError):
        return str(cause)
    if _is_out_of_memory(failure):
        return f"training worker {rank} ran out of memory; {_REMEDY}"
    if _is_death(failure):
        return f"training worker {rank} died: it was killed, or its node is gone"
    if _is_lost_connection(failure):
        return f"training worker {rank} lost the connection to another, which was killed, or its node is gone"
    return f"training worker {rank} failed: {cause_line(cause)}"


def _order(failure: Exception) -> int:
    """Rank a failure by how likely it came first.

    A worker that names the one to blame comes before one that died, then any error but a lost connection.
    """
    if isinstance(_cause(failure), WorkerError | KasaError):
        return 0
    if _is_death(failure) or _is_out_of_memory(failure):
        return 1
    return 3 if _is_lost_connection(failure) else 2


def _is_death(failure: Exception) -> bool:
    return hasattr(failure, "health_check_failure")


def _is_lost_connection(failure: Exception) -> bool:
    return "connection" in str(failure).lower()


def _is_out_of_memory(failure: Exception) -> bool:
    return any(mark in str(failure) for mark in _OUT_OF_MEMORY)


def _cause(failure: Exception) -> BaseException:
    return getattr(failure, "cause", None) or failure


class RunTasks(Protocol):
    """`pipeline.cluster.workers.run_tasks`, or what stands around it."""

    def __call__(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        resources: Resources | Callable[[Item], Resources],
        *,
        while_waiting: Callable[[], None],
    ) -> list[Result]: ...


def run_journalled_tasks(
    run_tasks: RunTasks,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    resources: Resources | Callable[[Item], Resources],
    journals: Iterable[Path],
    follow: Follow,
) -> list[Result]:
    """Run `function` once for each item on the cluster; results in order.

    Args:
        journals: the files that the tasks write to. What an earlier run of the command left in them is handed on first.
        follow: called about twice a second and once at the end, with the records that are new.
    """
    tails = [JournalTail(journal) for journal in journals]

    def look() -> None:
        follow([record for tail in tails for record in tail.new_records()])

    results = run_tasks(function, items, resources, while_waiting=look)
    look()
    return results


def counting(
    bars: ProgressBars, activity: str, total: int, unit: str, count: Callable[[Sequence[Any]], int] = len
) -> Follow:
    """Show how much of an activity is done, by what the records say.

    Args:
        total: how many `unit` there are in all.
        count: how many of them some records stand for.
    """
    done = 0

    def follow(records: Sequence[Record]) -> None:
        nonlocal done
        done += count(records)
        # Work that an interruption cut off is journalled twice.
        bars.update(activity, min(done, total), total, unit)

    return follow
