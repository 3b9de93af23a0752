"""Data files at an address, `https://...`: fetched once into the workspace, where a run finds them ever after.

A run depends on the bytes that were fetched, not on what the address has later; to fetch anew, remove the file.

Hub data sets, `hub:OWNER/NAME[/SUBSET][@REVISION][:SPLIT]`: each revision of a split becomes a parquet file of its own
in the workspace, so that a run depends on those bytes, not on the hub, and an old revision is never taken for a new one.

Without a revision a run takes the newest one that is known here, and `look_for_newest` asks the hub which that is. What
is named is taken as it stands: a branch or a tag that moves on is not fetched again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

from filelock import FileLock

from pipeline.config.settings import DataSettings
from pipeline.core.console import console
from pipeline.core.errors import DataError, WorkspaceError
from pipeline.core.files import atomic_write

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


PREFIX = "hub:"
_FORM = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<subset>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]*))?"
)
_PATIENCE_S = 20.0


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set, or of a subset of it; `revision` is None where the newest is meant."""

    name: str
    revision: str | None
    split: str
    subset: str | None = None

    def __str__(self) -> str:
        subset = f"/{self.subset}" if self.subset else ""
        return f"{PREFIX}{self.name}{subset}{f'@{self.revision}' if self.revision else ''}:{self.split}"

    @property
    def file_name(self) -> str:
        """Of its copy in the workspace."""
        return f"{self.subset}--{self.split}.parquet" if self.subset else f"{self.split}.parquet"


def parse_entry(entry: str, key: str) -> HubSplit:
    """What an entry of the recipe means.

    Raises:
        DataError: it has not the form of one; `key` names its place in the recipe.
    """
    found = _FORM.fullmatch(entry.removeprefix(PREFIX))
    if found is None:
        raise DataError(
            f"{key}: {entry} must have the form hub:OWNER/NAME[/SUBSET][@REVISION][:SPLIT], e.g. hub:owner/dataset:train"
        )
    return HubSplit(found["name"], found["revision"], found["split"] or "train", found["subset"])


def hub_file(split: HubSplit, workspace: Path, fetch: bool) -> Path | None:
    """The split's parquet file, fetched where it is absent; None where `fetch` forbids that.

    Raises:
        DataError: it cannot be fetched.
        WorkspaceError: it cannot be stored.
    """
    revision = split.revision or _newest_known(split.name, workspace)
    if revision is None:
        if not fetch:
            return None
        revision = _ask(split.name)
        _remember(split.name, revision, workspace)
    file = _folder(split.name, workspace) / revision.replace("/", "--") / split.file_name
    if not file.exists():
        if not fetch:
            return None
        _export(split, revision, file)
    return file


def look_for_newest(settings: DataSettings, workspace: Path) -> None:
    """Ask the hub for the newest revision of each data set that the recipe names without one, and fetch it if it is new.

    Where the hub cannot be reached, what is here already serves, and a line says so.

    Raises:
        DataError: there is nothing here yet, or the new revision cannot be fetched.
    """
    for name, splits in _following(settings).items():
        known = _newest_known(name, workspace)
        try:
            newest = _ask(name)
            for split in splits:
                hub_file(replace(split, revision=newest), workspace, fetch=True)
        except DataError as error:
            if known is None:
                raise
            console.print(f"{error}; going on with revision {known[:12]}, which is here", markup=False, soft_wrap=True)
            continue
        # Only now that all of it is here: a run without a network must find what it is told to take.
        _remember(name, newest, workspace)


def _following(settings: DataSettings) -> dict[str, set[HubSplit]]:
    """The data sets whose newest revision is meant, with the splits that are used."""
    found: dict[str, set[HubSplit]] = {}
    for side in ("train", "heldout", "calibration"):
        for entry in getattr(settings, side):
            if entry.startswith(PREFIX):
                split = parse_entry(entry, f"data.{side}")
                if split.revision is None:
                    found.setdefault(split.name, set()).add(split)
    return found


def _ask(name: str) -> str:
    """The newest revision, as the hub says."""
    from huggingface_hub import HfApi

    try:
        revision = HfApi().dataset_info(name, timeout=_PATIENCE_S).sha
    except Exception as error:  # the hub client lets errors of several libraries through
        raise DataError(
            f"{PREFIX}{name}: the hub cannot be asked for its newest revision ({_first_line(error)}); check the name and "
            "the network, or name a local file"
        ) from None
    if not revision:
        raise DataError(f"{PREFIX}{name}: the hub knows no revision of it; name one with {PREFIX}{name}@REVISION")
    return str(revision)


def _export(split: HubSplit, revision: str, file: Path) -> None:
    import datasets

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.parent / f".{file.name}.lock"):
            if file.exists():
                return
            console.print(f"fetching {split} (revision {revision[:12]}) from the hub", markup=False, soft_wrap=True)
            try:
                rows = datasets.load_dataset(split.name, split.subset, split=split.split, revision=revision)
            except Exception as error:  # as above
                raise DataError(
                    f"{split} cannot be fetched from the hub: {_first_line(error)}; check the name, the revision, the "
                    "split and the network, or name a local file"
                ) from None
            with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-") as scratch:
                rows.to_parquet(Path(scratch, file.name))
                os.replace(Path(scratch, file.name), file)
    except OSError as error:
        raise WorkspaceError(f"{split} cannot be stored in {file}: {error}; free space or rights?") from None


def _newest_known(name: str, workspace: Path) -> str | None:
    try:
        return (_folder(name, workspace) / "newest").read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def _remember(name: str, revision: str, workspace: Path) -> None:
    atomic_write(_folder(name, workspace) / "newest", revision)


def _folder(name: str, workspace: Path) -> Path:
    return workspace / "sources" / "hub" / name.replace("/", "--")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
