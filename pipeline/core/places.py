"""Where a workspace is, by its name alone, and the names within: nothing is created or asked."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

# Unfinished work lies beside what it will be, under a name with this end.
PARTIAL = ".partial"
ARTIFACTS, INPUTS = "artifacts", "inputs"
# Says that an input is complete.
COMPLETE = ".complete"
_FILE = "file://"


def is_remote(place: Path | str) -> bool:
    """Whether a workspace is named by a URL; that of a local file is a path."""
    return "://" in str(place) and not str(place).startswith(_FILE)


def local_folder(place: Path | str) -> Path:
    """The folder of a workspace on this node: itself, or that of the copy, below `$KASA_CACHE` (`~/.cache/kasa`)."""
    if not is_remote(place):
        return Path(str(place).removeprefix(_FILE))
    url = str(place).rstrip("/")
    cache = Path(os.environ.get("KASA_CACHE") or Path.home() / ".cache" / "kasa").expanduser().resolve()
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", url.partition("://")[2])[-40:].strip("-")
    return cache / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
