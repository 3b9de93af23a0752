"""One run in progress: its workspace, its tracking, and how a stage is wrapped.

A run that was interrupted leaves `WORKSPACE/runs/DIGEST.json`; the same recipe run again finds it there and goes on in the
same MLflow runs. It is removed when the run is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, ArtifactStore, StageKey, content_digest
from pipeline.console import ProgressBars
from pipeline.errors import WorkspaceError
from pipeline.recipe import Recipe, recipe_values
from pipeline.report.facts import StageFacts
from pipeline.tracking import Tracking

# Enough for the quickstart with room to spare; a full disk in the middle of a run helps nobody.
LEAST_FREE_BYTES = 2 * 2**30
# Artifacts up to this size are copied into MLflow, larger ones referred to by path and key.
COPIED_BYTES = 64 * 2**20

# Set by Ray in the environment of a submitted job.
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

Make = Callable[[Path], dict[str, Any]]
Publish = Callable[[str, Artifact], None]


@dataclass
class RunContext:
    """What the stages of one run share.

    Attributes:
        parent_run: id of the MLflow run that the stages' runs belong to.
        finished: facts about the stages done so far, in the order of their ending.
    """

    recipe: Recipe
    workspace: Path
    store: ArtifactStore
    tracking: Tracking
    bars: ProgressBars
    parent_run: str
    children: dict[str, str]
    finished: list[StageFacts] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageRun]:
        """A stage's MLflow run; the stage finds or makes its artifacts within the block."""
        run_id, resumed = self._child(name)
        stage = StageRun(self.store, self.tracking, run_id, resumed)
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

    def log_artifact(self, run_id: str, path: Path, place: str | None = None) -> None:
        """Log a file or folder; a large one as a small note that says where it lies."""
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
        if size <= COPIED_BYTES:
            self.tracking.log_files(run_id, path, place)
            return
        with tempfile.TemporaryDirectory() as folder:
            note = Path(folder) / f"{path.name}.reference.json"
            note.write_text(json.dumps({"path": str(path), "bytes": size}), encoding="utf-8")
            self.tracking.log_files(run_id, note, place)

    def _child(self, stage: str) -> tuple[str, bool]:
        if (known := self.children.get(stage)) and self.tracking.resume_run(known):
            return known, True
        self.children[stage] = self.tracking.start_run(stage, {}, parent=self.parent_run)
        _write_state(self.workspace, self.recipe, self.parent_run, self.children)
        return self.children[stage], False


@dataclass
class StageRun:
    """One stage at work in its MLflow run.

    Attributes:
        resumed: the run was begun by an earlier process that did not live to end it.
        status, key: `computed` or `reused`, and the key of the stage's main artifact.
    """

    store: ArtifactStore
    tracking: Tracking
    run_id: str
    resumed: bool
    status: str = "computed"
    key: str = ""

    def artifact(self, key: StageKey, make: Make) -> Artifact:
        """Find or make an artifact that remembers the run it was made in."""
        return self.store.find_or_make(key, lambda folder: {**make(folder), "mlflow_run_id": self.run_id})

    def main_artifact(self, key: StageKey, make: Make) -> Artifact:
        """The artifact that the stage is there for: its key and whether it was reused are tags of the run."""
        self.tracking.tag(self.run_id, {"kasa.key": key.key})
        artifact = self.artifact(key, make)
        maker = artifact.facts["mlflow_run_id"]
        self.key, self.status = key.key, "reused" if artifact.reused else "computed"
        self.tracking.tag(self.run_id, {"kasa.status": self.status, "kasa.artifact": str(artifact.folder)})
        if maker != self.run_id:
            self.tracking.tag(self.run_id, {"kasa.reused_from": maker})
        return artifact

    @property
    def must_publish(self) -> bool:
        """Whether the run still lacks what a stage logs: it made its artifact, now or before it was interrupted."""
        return self.status == "computed" or self.resumed


def open_context(recipe: Recipe, bars: ProgressBars, tags: Mapping[str, str]) -> RunContext:
    """Make the workspace ready and start, or go on with, the recipe's MLflow parent run.

    Raises:
        WorkspaceError: the workspace cannot be written, the disk is full, or MLflow cannot be used.
    """
    workspace = recipe.workspace
    check_workspace(workspace)
    tracking = Tracking(workspace, recipe.name)
    state = _read_state(workspace, recipe)
    parent = state.get("parent")
    if not (parent and tracking.resume_run(parent)):
        state = {"children": {}}
        parent = tracking.start_run(recipe.name, {**tags, "kasa.recipe": recipe.name})
    context = RunContext(recipe, workspace, ArtifactStore(workspace), tracking, bars, parent, dict(state["children"]))
    _write_state(workspace, recipe, parent, context.children)
    return context


def close_context(context: RunContext) -> None:
    """The run is complete: the next one is a new run."""
    _state_file(context.workspace, context.recipe).unlink(missing_ok=True)


def check_workspace(workspace: Path) -> None:
    """Create the workspace if need be, and make sure it can hold what a run writes.

    Raises:
        WorkspaceError: it cannot be created or written, its disk is nearly full, or a Ray job would lose it.
    """
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


def _read_state(workspace: Path, recipe: Recipe) -> dict[str, Any]:
    try:
        return json.loads(_state_file(workspace, recipe).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {"children": {}}


def _write_state(workspace: Path, recipe: Recipe, parent: str, children: dict[str, str]) -> None:
    file = _state_file(workspace, recipe)
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps({"parent": parent, "children": children}), encoding="utf-8")
    os.replace(temporary, file)
