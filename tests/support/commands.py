"""`kasa` commands with `--json`, run to their end or killed, and what they left in a workspace."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.run.lineage import stored_artifacts
from pipeline.storage.artifacts import ArtifactStore
from tests.support.processes import beneath, end_all, start_kasa

Json = dict[str, Any]
PATIENCE_S = 900.0


def run_kasa(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, patience_s: float = PATIENCE_S
) -> Json:
    """Run a `kasa` command in `folder` and return its JSON result.

    Raises:
        RuntimeError: The command failed; the message holds the end of its stderr.
        subprocess.TimeoutExpired: The command took longer than `patience_s`; it was killed.
    """
    return finish(start_kasa([*arguments, "--json"], folder, environment), patience_s)


def finish(process: subprocess.Popen[str], patience_s: float = PATIENCE_S) -> Json:
    """Wait for a command that `start_kasa` started with `--json` and return its JSON result; raises as `run_kasa`."""
    try:
        out, said = process.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    if process.returncode:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}: {said[-3000:]}")
    result: Json = json.loads(out.splitlines()[-1])
    return result


def kill_with_descendants(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to a command and then to all that it started."""
    left = beneath(process)
    process.kill()
    process.communicate()
    end_all(left)


def times_of_completion(workspace: Path) -> dict[str, str]:
    """Return when each artifact in a workspace was completed, by its name `STAGE/KEY`."""
    return {one.name: one.made.isoformat() for one in stored_artifacts(ArtifactStore(workspace))}
