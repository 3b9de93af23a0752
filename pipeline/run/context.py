"""One run in progress: its workspace, its artifacts, its MLflow runs and how it reaches the cluster.

A run that was interrupted leaves `WORKSPACE/runs/DIGEST.json`. The same recipe run again finds it there and continues in
the same MLflow runs. The file is removed when the run is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from kasa.errors import DamagedFileError
from kasa.files import check_sealed_folder, read_sealed_json, sealed_json
from pipeline.cluster.workers import Resources, WorkerGroup, run_tasks, run_training_workers
from pipeline.config.recipe import Recipe, recipe_values
from pipeline.core.console import ProgressBars, console
from pipeline.core.errors import WorkspaceError
from pipeline.core.files import atomic_write, content_digest
from pipeline.registry.store import Registry
from pipeline.report.facts import StageFacts
from pipeline.storage.artifacts import ArtifactStore, locked
from pipeline.storage.workspace import Workspace, open_workspace
from pipeline.tracking.runs import Tracking

# Enough for the quickstart with room to spare; a full disk in the middle of a run helps nobody.
LEAST_FREE_BYTES = 2 * 2**30

# Set by Ray in the environment of a submitted job.
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# The recipe with its overrides and defaults, as it was run.
RECIPE_FILE = "recipe.yaml"
Item = TypeVar("Item")
Result = TypeVar("Result")


def ready_workspace(recipe: Recipe) -> Workspace:
    """Create the workspace if need be, and make sure it can hold what a run writes.

    Raises:
        WorkspaceError: it cannot be created or written, its disk is nearly full, a Ray job would lose it, or its store
            cannot be used.
    """
    storage = open_workspace(recipe.location)
    _check_folder(storage.folder)
    return storage


def read_state(storage: Workspace, recipe: Recipe) -> dict[str, Any]:
    """What an interrupted run of the recipe has left; empty where there was none, or it is damaged."""
    file = _state_file(storage.folder, recipe)
    storage.load(file)
    try:
        return read_sealed_json(file)
    except FileNotFoundError:
        return {}
    except DamagedFileError as error:
        console.print(f"{error}; the run begins anew, with the artifacts that are there", markup=False, soft_wrap=True)
        return {}


def write_state(storage: Workspace, recipe: Recipe, state: dict[str, Any]) -> None:
    """Keep what the same command has to know, should this process die."""
    file = _state_file(storage.folder, recipe)
    atomic_write(file, sealed_json(state))
    storage.save(file)


def discard_state(storage: Workspace, recipe: Recipe) -> None:
    """The run is complete: the next one of the recipe is a new run."""
    storage.discard(_state_file(storage.folder, recipe))


def recipe_digest(recipe: Recipe) -> str:
    """What tells runs of one recipe from those of others in the workspace."""
    return content_digest(recipe_values(recipe))[:16]


@contextmanager
def alone(storage: Workspace, name: str, what: str) -> Iterator[None]:
    """During the block no other process, on any machine, does what `name` stands for in the workspace.

    Waits as long as another one does; `what` says in words what that is.
    """
    place = storage.folder / "runs" / content_digest(name)[:16]

    def say(holder: str) -> None:
        console.print(f"{what} is at work in this workspace already ({holder}); waiting for it to end", soft_wrap=True)

    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place.with_suffix(".lock"), say), storage.leased(place, say):
        yield


def one_change_at_a_time(storage: Workspace, model: str) -> AbstractContextManager[None]:
    """During the block no other command changes the aliases of a registered model from this workspace, if there is one."""
    if not storage.folder.is_dir():
        return nullcontext()
    return alone(storage, f"register {model}", f"another change of the model {model}")


def _state_file(workspace: Path, recipe: Recipe) -> Path:
    return workspace / "runs" / f"{recipe_digest(recipe)}.json"


def _check_folder(workspace: Path) -> None:
    if _RAY_JOB in os.environ and not workspace.is_absolute():
        raise WorkspaceError(
            f"the workspace {workspace} of a Ray job would lie in the job's own temporary folder; name a folder on shared "
            "storage with workspace=/ABSOLUTE/PATH"
        )
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workspace) as probe:  # without a name, so that a kill leaves nothing
            probe.write(b"x" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
        free = shutil.disk_usage(workspace).free
    except OSError as error:
        raise WorkspaceError(
            f"the workspace {workspace} cannot be written ({error.strerror}); choose another with workspace=FOLDER"
        ) from None
    if free < LEAST_FREE_BYTES:
        raise WorkspaceError(
            f"the workspace {workspace} has {free / 2**30:.1f} GiB free and a run needs {LEAST_FREE_BYTES / 2**30:.0f}; "
            "free some, or choose another with workspace=FOLDER"
        )


@dataclass
class RunContext:
    """What the stages of one run share.

    Attributes:
        workspace: the folder of this node that everything lies in.
        storage: what is behind that folder.
        parent_run: id of the MLflow run that the stages' runs belong to.
        children: ids of the stages' runs.
        recomputed: stages that were asked to make their artifacts again, each with the keys of those it has made again.
        finished: facts about the stages done so far, in the order of their ending.
        confirm: raises where this process has lost the right to go on; asked before each stage and before the registry
            is changed.
        check_inputs: raises where what the stages read has changed since its digest was taken; asked when an artifact is made,
            before it counts.
        inputs: which files the stages read, as JSON values (`BaseModel.as_found`).
        keeps_state: whether the workspace remembers the run while it is not complete. A run that is part of another one
            is found again by what it is for.
    """

    recipe: Recipe
    storage: Workspace
    store: ArtifactStore
    tracking: Tracking
    registry: Registry
    bars: ProgressBars
    parent_run: str
    children: dict[str, str]
    recomputed: dict[str, list[str]] = field(default_factory=dict)
    finished: list[StageFacts] = field(default_factory=list)
    confirm: Callable[[], None] = lambda: None
    check_inputs: Callable[[], None] = lambda: None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    keeps_state: bool = True
    _writing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def workspace(self) -> Path:
        """The workspace's folder on this node."""
        return self.storage.folder

    def run_tasks(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        resources: Resources | Callable[[Item], Resources],
        on_result: Callable[[Item, Result], None] = lambda item, result: None,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> list[Result]:
        """As `pipeline.cluster.workers.run_tasks`; the tasks find what their items name, on whatever node they run."""
        with self.storage.synced():
            return run_tasks(self.storage.on_node(function), items, resources, on_result, while_waiting)

    def run_training_workers(
        self,
        function: Callable[[Any, Callable[[], bool]], None],
        job: Any,
        workers: WorkerGroup,
        scratch: Path,
        interruptions: Path,
    ) -> None:
        """As `pipeline.cluster.workers.run_training_workers`, likewise."""
        with self.storage.synced():
            run_training_workers(self.storage.on_node(function), job, workers, scratch, interruptions)

    def describe_run(self) -> None:
        """Log the recipe to the parent run, as parameters and as a file."""
        values = recipe_values(self.recipe)
        self.tracking.log_parameters(self.parent_run, values)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / RECIPE_FILE
            file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
            self.tracking.log_files(self.parent_run, file)

    def describe_cluster(self, facts: Mapping[str, str]) -> None:
        """Tag the parent run with the Ray cluster it uses: `kasa.cluster.*`."""
        self.tracking.tag(self.parent_run, {f"kasa.cluster.{name}": value for name, value in facts.items()})

    def registered_adapter(self, uri: str, train_key: str) -> Path:
        """The adapter folder of a registered version, fetched into the workspace; `train_key` is that of its training."""
        folder = self.registry.fetch_adapter(uri, self.workspace / "champions" / train_key)
        self.storage.upload_input(folder, train_key, partial(check_sealed_folder, folder))
        return folder

    def child_run(self, stage: str) -> tuple[str, bool]:
        """The MLflow run of a stage, and whether an interrupted process had begun it."""
        if (known := self.children.get(stage)) and self.tracking.resume_run(known):
            return known, True
        origin = f"{self.parent_run}.{stage}"
        self.children[stage] = self.tracking.start_run(stage, {}, parent=self.parent_run, origin=origin)
        self.save()
        return self.children[stage], False

    def save(self) -> None:
        """Keep what the same command has to know, should this process die."""
        if not self.keeps_state:
            return
        with self._writing:  # stages may run side by side
            state = {"parent": self.parent_run, "children": self.children, "remade": self.recomputed}
            write_state(self.storage, self.recipe, state)


@dataclass(frozen=True)
class NestedRun:
    """The place in MLflow of a run that is part of another one.

    Attributes:
        label: its name.
        parent: id of the run it is part of.
        origin: what it is for, by which it is found again after an interruption.
    """

    label: str
    parent: str
    origin: str


def open_context(
    recipe: Recipe,
    storage: Workspace,
    bars: ProgressBars,
    tags: Mapping[str, str],
    recompute: Iterable[str] = (),
    confirm: Callable[[], None] = lambda: None,
    within: NestedRun | None = None,
) -> RunContext:
    """Start or resume the recipe's MLflow parent run in a workspace that is ready.

    Args:
        recompute: names of stages that make their artifacts again.
        within: where the run is part of another one.

    Raises:
        WorkspaceError: MLflow cannot be used.
    """
    workspace = storage.folder
    tracking = Tracking(workspace, recipe.name)
    tags = {**tags, "kasa.recipe": recipe.name}
    state = {} if within else read_state(storage, recipe)
    parent = state.get("parent")
    if within:
        parent = tracking.start_run(within.label, tags, parent=within.parent, origin=within.origin)
        tracking.resume_run(parent)
    elif not (parent and tracking.resume_run(parent)):
        # Written before the run is made: a process that dies in between finds that run again.
        state = {"origin": state.get("origin") or uuid.uuid4().hex}
        write_state(storage, recipe, state)
        parent = tracking.start_run(recipe.name, tags, origin=state["origin"])
    context = RunContext(
        recipe,
        storage,
        ArtifactStore(workspace, storage),
        tracking,
        tracking.retrying(Registry(workspace)),
        bars,
        parent,
        dict(state.get("children", {})),
        {stage: state.get("remade", {}).get(stage, []) for stage in recompute},
        confirm=confirm,
        keeps_state=within is None,
    )
    context.save()
    return context


def close_context(context: RunContext) -> None:
    """The run is complete: the next one is a new run."""
    if context.keeps_state:
        discard_state(context.storage, context.recipe)


def seed_tags(recipe: Recipe) -> dict[str, str]:
    """Everything that chance is drawn from: `kasa.seed.*`."""
    return {"kasa.seed.split": str(recipe.data.split_seed), "kasa.seed.train": str(recipe.train.seed)}
