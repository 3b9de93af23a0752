"""What stands in MLflow for an artifact that is too large to be copied, or that another run made."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pipeline.artifacts.store import MANIFEST, Artifact


def reuse_note(artifact: Artifact, maker: str, page: str | None) -> str:
    """What the page of a run says of an artifact that another run made; `page` is where that run is shown, if anywhere."""
    run = f"[run {maker[:8]}]({page})" if page else f"run {maker}, which this store does not have"
    return f"Nothing was done here: the artifact `{artifact.stage}/{artifact.key}` was made by {run}."


def reference(path: Path, size: int, root: Path) -> dict[str, Any]:
    """The note that stands for a file or folder too large to be copied.

    Args:
        path: lies in an artifact, or anywhere else.
        size: in bytes.
        root: the folder of all artifacts.

    Returns:
        `path` (absolute), `bytes`, and, within an artifact, its `key` (STAGE/KEY) and `manifest_sha256`: the same digest
        of the same file means the same artifact.
    """
    note: dict[str, Any] = {"path": str(path.resolve()), "bytes": size}
    for folder in (path, *path.parents):
        if folder.parent.parent == root:
            digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
            return note | {"key": f"{folder.parent.name}/{folder.name}", "manifest_sha256": digest}
    return note
