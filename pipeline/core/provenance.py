"""Where a run comes from, as tags of its MLflow run: the code's version, the seeds, the user."""

from __future__ import annotations

import getpass
import subprocess
from pathlib import Path

from pipeline.core.code import source_digest

_GIT_PATIENCE_S = 20.0
_HERE = Path(__file__).resolve()


def code_tags(module: Path = _HERE) -> dict[str, str]:
    """The digest of the code, and the commit it was checked out from, where it was: `kasa.code.*`.

    `kasa.code.dirty` says whether a tracked file differs from that commit. MLflow's own tag of the commit is set too; its
    pages show it.
    """
    tags = {"kasa.code.digest": source_digest()[:16]}
    # An installed copy may lie within somebody else's repository: only one that tracks this file is ours.
    if _git(module.parent, "ls-files", "--error-unmatch", module.name) is None:
        return tags
    commit = _git(module.parent, "rev-parse", "HEAD")
    changed = _git(module.parent, "status", "--porcelain", "--untracked-files=no", ":/")
    if commit is None or changed is None:
        return tags
    return tags | {
        "kasa.code.commit": commit,
        "kasa.code.dirty": str(bool(changed)).lower(),
        "mlflow.source.git.commit": commit,
    }


def user_name() -> str:
    """Who runs this, as the system knows them."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where there is no git, no repository, or no answer."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
