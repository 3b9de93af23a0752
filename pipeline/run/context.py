"""One run in progress: its workspace, its tracking, and how a stage is wrapped.

A run that was interrupted leaves `WORKSPACE/runs/DIGEST.json`; the same recipe run again finds it there and goes on in the
same MLflow runs. It is removed when the run is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipeline.artifacts.store import ADAPTER, Artifact, ArtifactStore, StageKey
from pipeline.cluster.workers import Resources, WorkerGroup, run_tasks, run_training_workers
from pipeline.config.recipe import Recipe, recipe_values
from pipeline.core.console import ProgressBars
from pipeline.core.errors import WorkspaceError
from pipeline.core.files import atomic_write, content_digest
from pipeline.registry.store import Registry
from pipeline.report.facts import StageFacts
from pipeline.run.lineage import ingredients_by_name, reference, reuse_note, stored_artifacts, why_made
from pipeline.storage.workspace import Workspace, open_workspace
from pipeline.tracking.runs import Tracking

# Enough for the quickstart with room to spare; a full disk in the middle of a run helps nobody.
LEAST_FREE_BYTES = 2 * 2**30
# Artifacts up to this size are copied into MLflow, larger ones referred to by path and key.
COPIED_BYTES = 64 * 2**20
# The recipe with its overrides and defaults, as it was run.
RECIPE_FILE = "recipe.yaml"

# Set by Ray in the environment of a submitted job.
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

Item = TypeVar("Item")
Result = TypeVar("Result")
Make = Callable[[Path], dict[str, Any]]
Publish = Callable[[str, Artifact], None]


@dataclass
class RunContext:
    """What the stages of one run share.

    Attributes:
        workspace: the folder of this node that everything lies in.
        storage: what is behind that folder.
        parent_run: id of the MLflow run that the stages' runs belong to.
        children: ids of the stages' runs.
        remade: stages that are to make their artifacts anew, each with the keys of those that it has remade already.
        finished: facts about the stages done so far, in the order of their ending.
        confirm: raises where this process has lost the right to go on; asked before each stage and before the registry
            is changed.
        keeps_state: whether the workspace remembers the run while it is not complete. One that is part of another is found
            again by what it is for.
    """

    recipe: Recipe
    storage: Workspace
    store: ArtifactStore
    tracking: Tracking
    registry: Registry
    bars: ProgressBars
    parent_run: str
    children: dict[str, str]
    remade: dict[str, list[str]] = field(default_factory=dict)
    finished: list[StageFacts] = field(default_factory=list)
    confirm: Callable[[], None] = lambda: None
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

    @contextmanager
    def stage(self, name: str) -> Iterator[StageRun]:
        """A stage's MLflow run; the stage finds or makes its artifacts within the block."""
        self.confirm()
        run_id, resumed = self._child(name)
        stage = StageRun(self, run_id, resumed)
        started = time.perf_counter()
        with self.tracking.open_run(run_id):
            self.tracking.tag(run_id, {"kasa.stage": name})
            yield stage
        seconds = time.perf_counter() - started
        self.finished.append(StageFacts(name, stage.status, seconds, stage.key, run_id))

    def run_stage(self, key: StageKey, make: Make, publish: Publish) -> Artifact:
        """A stage that makes one artifact. `publish` logs what is worth seeing, unless the artifact was reused."""
        with self.stage(key.stage) as stage:
            artifact = stage.main_artifact(key, make)
            if stage.must_publish:
                publish(stage.run_id, artifact)
        return artifact

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

    def log_artifact(self, run_id: str, path: Path, place: str | None = None) -> None:
        """Log a file or folder; a large one as a small note that says where it lies (`reference`)."""
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
        if size <= COPIED_BYTES:
            self.tracking.log_files(run_id, path, place)
            return
        with tempfile.TemporaryDirectory() as folder:
            note = Path(folder) / f"{path.name}.reference.json"
            facts = {**reference(path, size, self.store.root), "path": self.storage.address(path.resolve())}
            note.write_text(json.dumps(facts, indent=1), encoding="utf-8")
            self.tracking.log_files(run_id, note, place)

    def registered_adapter(self, uri: str, train_key: str) -> Path:
        """The adapter folder of a registered version, fetched into the workspace; `train_key` is that of its training."""
        folder = self.registry.download(f"{uri}/artifacts/{ADAPTER}", self.workspace / "champions" / train_key)
        self.storage.upload_input(folder, train_key)
        return folder

    def _child(self, stage: str) -> tuple[str, bool]:
        if (known := self.children.get(stage)) and self.tracking.resume_run(known):
            return known, True
        origin = f"{self.parent_run}.{stage}"
        self.children[stage] = self.tracking.start_run(stage, {}, parent=self.parent_run, origin=origin)
        self.save()
        return self.children[stage], False

    def save(self) -> None:
        """Keep what the same command, should it have to go on from here, must know."""
        if not self.keeps_state:
            return
        with self._writing:  # stages may run side by side
            state = {"parent": self.parent_run, "children": self.children, "remade": self.remade}
            _write_state(self.storage, self.recipe, state)


@dataclass(frozen=True)
class NestedRun:
    """A run's place in MLflow: its name, the run it is part of, and what it is for, once and for all."""

    label: str
    parent: str
    origin: str


@dataclass
class StageRun:
    """One stage at work in its MLflow run.

    Attributes:
        resumed: the run was begun by an earlier process that did not live to end it.
        status, key: `computed` or `reused`, and the key of the stage's main artifact.
    """

    context: RunContext
    run_id: str
    resumed: bool
    status: str = "computed"
    key: str = ""

    def artifact(self, key: StageKey, make: Make) -> Artifact:
        """Find or make an artifact that remembers the run it was made in."""
        remade = self.context.remade.get(key.stage)
        remake = remade is not None and key.key not in remade

        def make_and_remember(folder: Path) -> dict[str, Any]:
            started = time.perf_counter()
            facts = make(folder)
            return {**facts, "mlflow_run_id": self.run_id, "seconds": time.perf_counter() - started}

        artifact = self.context.store.find_or_make(key, make_and_remember, remake)
        if remade is not None and remake:
            remade.append(key.key)
            self.context.save()
        return artifact

    def main_artifact(self, key: StageKey, make: Make) -> Artifact:
        """The artifact that the stage is there for: its key and whether it was reused are tags of the run."""
        tracking = self.context.tracking
        tracking.tag(self.run_id, {"kasa.key": key.key})
        # Of the parts of a comparison each is meant to be unlike the others.
        if self.context.keeps_state and (reasons := self._reasons(key)):
            self.context.bars.say(f"{key.stage}: made anew: {reasons}")
            tracking.tag(self.run_id, {"kasa.made_anew_for": reasons})
        artifact = self.artifact(key, make)
        maker = artifact.facts["mlflow_run_id"]
        self.key, self.status = key.key, "reused" if artifact.reused else "computed"
        tracking.tag(
            self.run_id, {"kasa.status": self.status, "kasa.artifact": self.context.storage.address(artifact.folder)}
        )
        if maker != self.run_id:
            tracking.tag(self.run_id, {"kasa.reused_from": maker})
            tracking.describe(self.run_id, reuse_note(artifact, maker, tracking.page(maker)))
        return artifact

    def _reasons(self, key: StageKey) -> str:
        """Why the artifact is about to be made although the stage has made others."""
        if key.stage in self.context.remade:
            return "you asked for it"
        if self.context.store.find(key):
            return ""
        return "; ".join(why_made(key, ingredients_by_name(stored_artifacts(self.context.store))))

    @property
    def must_publish(self) -> bool:
        """Whether the run still lacks what a stage logs: it made its artifact, now or before it was interrupted."""
        return self.status == "computed" or self.resumed


def open_context(
    recipe: Recipe,
    storage: Workspace,
    bars: ProgressBars,
    tags: Mapping[str, str],
    remake: Iterable[str] = (),
    confirm: Callable[[], None] = lambda: None,
    within: NestedRun | None = None,
) -> RunContext:
    """Start, or go on with, the recipe's MLflow parent run in a workspace that is ready; `remake` names stages.

    Args:
        within: where the run is part of another one.

    Raises:
        WorkspaceError: MLflow cannot be used.
    """
    workspace = storage.folder
    tracking = Tracking(workspace, recipe.name)
    tags = {**tags, "kasa.recipe": recipe.name}
    state = {} if within else _read_state(storage, recipe)
    parent = state.get("parent")
    if within:
        parent = tracking.start_run(within.label, tags, parent=within.parent, origin=within.origin)
        tracking.resume_run(parent)
    elif not (parent and tracking.resume_run(parent)):
        # Written before the run is made: a process that dies in between finds that run again.
        state = {"origin": state.get("origin") or uuid.uuid4().hex}
        _write_state(storage, recipe, state)
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
        {stage: state.get("remade", {}).get(stage, []) for stage in remake},
        confirm=confirm,
        keeps_state=within is None,
    )
    context.save()
    return context


def close_context(context: RunContext) -> None:
    """The run is complete: the next one is a new run."""
    if context.keeps_state:
        context.storage.discard(_state_file(context.workspace, context.recipe))


def ready_workspace(recipe: Recipe) -> Workspace:
    """Create the workspace if need be, and make sure it can hold what a run writes.

    Raises:
        WorkspaceError: it cannot be created or written, its disk is nearly full, a Ray job would lose it, or its store
            cannot be used.
    """
    storage = open_workspace(recipe.location)
    _check_folder(storage.folder)
    return storage


def _check_folder(workspace: Path) -> None:
    if _RAY_JOB in os.environ and not workspace.is_absolute():
        raise WorkspaceError(
            f"the workspace {workspace} of a Ray job would lie in the job's own temporary folder; name a folder on shared "
            "storage with workspace=/ABSOLUTE/PATH"
        )
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=workspace) as probe:
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


def _state_file(workspace: Path, recipe: Recipe) -> Path:
    return workspace / "runs" / f"{content_digest(recipe_values(recipe))[:16]}.json"


def _read_state(storage: Workspace, recipe: Recipe) -> dict[str, Any]:
    file = _state_file(storage.folder, recipe)
    storage.load(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _write_state(storage: Workspace, recipe: Recipe, state: dict[str, Any]) -> None:
    file = _state_file(storage.folder, recipe)
    atomic_write(file, json.dumps(state))
    storage.save(file)


def seed_tags(recipe: Recipe) -> dict[str, str]:
    """Everything that chance is drawn from: `kasa.seed.*`."""
    return {"kasa.seed.split": str(recipe.data.split_seed), "kasa.seed.train": str(recipe.train.seed)}
