"""Data files at an address, `https://...`: fetched once into the workspace, where a run finds them ever after.

A run depends on the bytes that were fetched, not on what the address has later; to fetch anew, remove the file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

from filelock import FileLock

from pipeline.console import console
from pipeline.errors import DataError, WorkspaceError

PREFIXES = ("https://", "http://")
_DOWNLOAD_PATIENCE_S = 30.0


def web_file(address: str, key: str, workspace: Path, fetch: bool) -> Path | None:
    """The file, fetched where it is absent; None where `fetch` forbids that. `key` names its place in the recipe.

    Raises:
        DataError: it cannot be fetched.
        WorkspaceError: it cannot be stored.
    """
    name = PurePosixPath(unquote(urlparse(address).path)).name
    if not name:
        raise DataError(f"{key}: {address} names no file")
    folder = workspace / "sources" / "web" / hashlib.sha256(address.encode()).hexdigest()[:16]
    file = folder / name
    if file.exists() or not fetch:
        return file if file.exists() else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            if not file.exists():
                console.print(f"fetching {address}", markup=False, soft_wrap=True)
                _fetch(address, key, file)
    except OSError as error:
        raise WorkspaceError(f"{address} cannot be stored in {file}: {error}; free space or rights?") from None
    return file


def _fetch(address: str, key: str, file: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".fetch-", delete=False) as out:
        try:
            with urllib.request.urlopen(address, timeout=_DOWNLOAD_PATIENCE_S) as answer:
                shutil.copyfileobj(answer, out)
                missing = answer.length
        except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
            Path(out.name).unlink()
            reason = getattr(error, "reason", None) or error
            raise DataError(
                f"{key}: {address} cannot be fetched ({reason}); check the address and the network, or name a local copy"
            ) from None
    if missing:
        Path(out.name).unlink()
        raise DataError(f"{key}: {address} broke off {missing} bytes before its end; run again")
    os.replace(out.name, file)
