"""What a run keeps in its workspace beside artifacts: room to write, and where it had come to when it was interrupted.

A run that was interrupted leaves `WORKSPACE/runs/DIGEST.json`. The same recipe run again finds it there and continues in
the same MLflow runs. The file is removed when the run is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pipeline.config.recipe import Recipe, recipe_values
from pipeline.core.errors import WorkspaceError
from pipeline.core.files import atomic_write, content_digest
from pipeline.storage.workspace import Workspace, open_workspace

# Enough for the quickstart with room to spare; a full disk in the middle of a run helps nobody.
LEAST_FREE_BYTES = 2 * 2**30

# Set by Ray in the environment of a submitted job.
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


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
    """What an interrupted run of the recipe has left; empty where there was none."""
    file = _state_file(storage.folder, recipe)
    storage.load(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def write_state(storage: Workspace, recipe: Recipe, state: dict[str, Any]) -> None:
    """Keep what the same command has to know, should this process die."""
    file = _state_file(storage.folder, recipe)
    atomic_write(file, json.dumps(state))
    storage.save(file)


def discard_state(storage: Workspace, recipe: Recipe) -> None:
    """The run is complete: the next one of the recipe is a new run."""
    storage.discard(_state_file(storage.folder, recipe))


def _state_file(workspace: Path, recipe: Recipe) -> Path:
    return workspace / "runs" / f"{content_digest(recipe_values(recipe))[:16]}.json"


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
