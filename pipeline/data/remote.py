"""Data files from elsewhere, fetched once into the workspace: `https://...` and
`hub:OWNER/NAME[/SUBSET][@REVISION][:SPLIT]`.

A web file comes from the host that the recipe names: a redirect to another one is refused, for it would have the last word on
what is trained on. Its size and the time that it may take are limited.

A run depends on the bytes that were fetched, not on what the address or the hub has later. To fetch a web file again,
delete it. Each revision of a split of a hub data set is stored as a parquet file of its own, so an old revision is never
taken for a new one. Without a revision a run takes the newest one that is known in the workspace, and `look_for_newest`
asks the hub for it. A revision that is named is fetched once: a branch or a tag that moves on is not fetched again.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urljoin, urlparse

from pipeline.config.settings import DataSettings
from pipeline.core.console import console
from pipeline.core.errors import DataError, WorkspaceError, one_line
from pipeline.core.files import atomic_write, make_once
from pipeline.core.machine import host_and_port
from pipeline.core.redaction import redacted

PREFIXES = ("https://", "http://")
PREFIX = "hub:"

_DOWNLOAD_TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 20
# An answer that does not say how long it is may be endless, and so may one that comes drop by drop.
_LONGEST_UNANNOUNCED_BYTES = 2 << 30
_SLOWEST_BYTES_PER_S, _SLOW_START_S = 1024, 60.0
_HUB_TIMEOUT_S = 20.0
_FORM = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<subset>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]*))?"
)


def web_file(address: str, key: str, workspace: Path, fetch: bool) -> Path | None:
    """The local copy of a web file, fetched if it is missing.

    Args:
        key: The recipe's key that holds the address, for errors.
        fetch: Whether it may be fetched. If not, a missing file gives None.

    Raises:
        DataError: It cannot be fetched, or it is no address.
        WorkspaceError: It cannot be stored.
    """
    shown = redacted(address)  # with another login or signature it is the same file
    if host_and_port(address, 443) is None:
        raise DataError(f"{key}: {shown} names no host")
    name = PurePosixPath(unquote(urlparse(address).path)).name
    if not name:
        raise DataError(f"{key}: {shown} names no file")
    file = workspace / "sources" / "web" / hashlib.sha256(shown.encode()).hexdigest()[:16] / name
    if not fetch:
        return file if file.exists() else None
    return _stored(file, shown, shown, lambda new: _download(address, f"{key}: {shown}", new))


@dataclass(frozen=True)
class HubSplit:
    """One split of a hub data set, or of a subset of it. `revision` is None if the newest is meant."""

    name: str
    revision: str | None
    split: str
    subset: str | None = None

    def __str__(self) -> str:
        subset = f"/{self.subset}" if self.subset else ""
        return f"{PREFIX}{self.name}{subset}{f'@{self.revision}' if self.revision else ''}:{self.split}"

    @property
    def file_name(self) -> str:
        """The name of its copy in the workspace."""
        return f"{self.subset}--{self.split}.parquet" if self.subset else f"{self.split}.parquet"


def parse_entry(entry: str, key: str) -> HubSplit:
    """Parse an entry of a recipe.

    Raises:
        DataError: It does not have the form of a hub data set. The message names `key`, where the entry stands.
    """
    found = _FORM.fullmatch(entry.removeprefix(PREFIX))
    if found is None:
        raise DataError(
            f"{key}: {entry} must have the form hub:OWNER/NAME[/SUBSET][@REVISION][:SPLIT], e.g. hub:owner/dataset:train"
        )
    return HubSplit(found["name"], found["revision"], found["split"] or "train", found["subset"])


def hub_file(split: HubSplit, workspace: Path, fetch: bool) -> Path | None:
    """The local parquet file of a split, fetched if it is missing.

    Args:
        fetch: Whether it may be fetched. If not, a missing file gives None.

    Raises:
        DataError: It cannot be fetched.
        WorkspaceError: It cannot be stored.
    """
    revision = split.revision or _newest_known(split.name, workspace)
    if revision is None:
        if not fetch:
            return None
        revision = _newest_on_hub(split.name)
        _remember(split.name, revision, workspace)
    file = _folder(split.name, workspace) / revision.replace("/", "--") / split.file_name
    if not fetch:
        return file if file.exists() else None
    subject = f"{split} (revision {revision[:12]}) from the hub"
    return _stored(file, str(split), subject, lambda new: _export(split, revision, new))


def look_for_newest(settings: DataSettings, workspace: Path) -> None:
    """Ask the hub for the newest revision of each data set that the recipe names without one, and fetch it if it is new.

    If the hub cannot be reached, the newest known revision is used, and a line says so.

    Raises:
        DataError: No revision is known yet, and none can be fetched.
    """
    for name, splits in _following(settings).items():
        known = _newest_known(name, workspace)
        try:
            newest = _newest_on_hub(name)
            for split in splits:
                hub_file(replace(split, revision=newest), workspace, fetch=True)
        except DataError as error:
            if known is None:
                raise
            console.print(f"{error}; going on with revision {known[:12]}, which is here", markup=False, soft_wrap=True)
            continue
        # Not before all its splits are stored: a run without a network must find the revision that it is told to take.
        _remember(name, newest, workspace)


def _stored(file: Path, name: str, subject: str, make: Callable[[Path], None]) -> Path:
    """Store a source in `file`, unless it is there, and say that it is fetched."""

    def announced(new: Path) -> None:
        console.print(f"fetching {subject}", markup=False, soft_wrap=True)
        make(new)

    try:
        return make_once(file, announced)
    except OSError as error:
        raise WorkspaceError(f"{name} cannot be stored in {file}: {error}; free space or rights?") from None


def _download(address: str, subject: str, file: Path) -> None:
    """Fetch a file; `subject` begins the errors."""
    try:
        with _opener().open(_request(address), timeout=_DOWNLOAD_TIMEOUT_S) as answer, file.open("wb") as out:
            _check_room(answer.length, file)
            missing = _copy(answer, out)
    except _AnswerError as error:
        raise DataError(f"{subject} {error}") from None
    except _FETCH_ERRORS as error:
        reason = getattr(error, "reason", None) or one_line(error)
        raise DataError(
            f"{subject} cannot be fetched ({reason}); check the address and the network, or name a local copy"
        ) from None
    if missing:
        raise DataError(f"{subject} broke off {missing} bytes before its end; run again")


# An OSError of another kind is one of the disk's.
_FETCH_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    TimeoutError,
    ConnectionError,
    ValueError,
)


class _AnswerError(Exception):
    """What is wrong with an answer, worded so that it follows the address, and what to do."""


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects within one host, never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlparse(req.full_url), urlparse(urljoin(req.full_url, newurl))
        if (new.hostname, new.port) != (old.hostname, old.port) or (old.scheme, new.scheme) == ("https", "http"):
            raise _AnswerError(
                f"redirects to {new.scheme}://{new.hostname}, which the recipe does not name; if that is right, put the final "
                "address into the recipe, or name a local copy"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _request(address: str) -> urllib.request.Request:
    """The request for an address. A login in it goes into a header, for urllib would take it for a part of the host."""
    parts = urlparse(address)
    login, _, place = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=place).geturl())
    if login:
        request.add_header("Authorization", f"Basic {base64.b64encode(unquote(login).encode()).decode()}")
    return request


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_SameHost)


def _check_room(announced: int | None, file: Path) -> None:
    free = shutil.disk_usage(file.parent).free
    if announced is not None and announced > free:
        raise _AnswerError(
            f"has {announced} bytes, and {free} are free in {file.parent}; free space or name a local copy"
        )


def _copy(answer: http.client.HTTPResponse, out: IO[bytes]) -> int:
    """Copy an answer, within the limits of size and time, and return how many of the bytes announced are missing."""
    announced, began, received = answer.length, time.monotonic(), 0
    while announced is None or received < announced:
        chunk = answer.read1(_CHUNK_BYTES if announced is None else min(_CHUNK_BYTES, announced - received))
        if not chunk:
            break
        received += len(chunk)
        out.write(chunk)
        if announced is None and received > _LONGEST_UNANNOUNCED_BYTES:
            raise _AnswerError(
                f"goes on after {received} bytes without having said how long it is; fetch it by hand and name the local copy"
            )
        if time.monotonic() - began > _SLOW_START_S + received / _SLOWEST_BYTES_PER_S:
            raise _AnswerError(f"is too slow ({received} bytes so far); run again, or name a local copy")
    return announced - received if announced is not None else 0


def _following(settings: DataSettings) -> dict[str, set[HubSplit]]:
    """The data sets that the recipe names without a revision, with the splits that it uses."""
    found: dict[str, set[HubSplit]] = {}
    for side in ("train", "heldout", "calibration"):
        for entry in getattr(settings, side):
            if entry.startswith(PREFIX):
                split = parse_entry(entry, f"data.{side}")
                if split.revision is None:
                    found.setdefault(split.name, set()).add(split)
    return found


def _newest_on_hub(name: str) -> str:
    """Ask the hub for the newest revision of a data set."""
    from huggingface_hub import HfApi

    try:
        revision = HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S).sha
    except Exception as error:  # the hub client lets errors of several libraries through
        raise DataError(
            f"{PREFIX}{name}: the hub cannot be asked for its newest revision ({one_line(error)}); check the name and "
            "the network, or name a local file"
        ) from None
    if not revision:
        raise DataError(f"{PREFIX}{name}: the hub knows no revision of it; name one with {PREFIX}{name}@REVISION")
    return str(revision)


def _export(split: HubSplit, revision: str, file: Path) -> None:
    import datasets

    try:
        rows = datasets.load_dataset(split.name, split.subset, split=split.split, revision=revision)
    except Exception as error:  # as above
        raise DataError(
            f"{split} cannot be fetched from the hub: {one_line(error)}; check the name, the revision, the split and the "
            "network, or name a local file"
        ) from None
    rows.to_parquet(file)


def _newest_known(name: str, workspace: Path) -> str | None:
    file = _folder(name, workspace) / "newest"
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WorkspaceError(f"{file} cannot be read ({error}); mend or delete it") from None


def _remember(name: str, revision: str, workspace: Path) -> None:
    file = _folder(name, workspace) / "newest"
    try:
        atomic_write(file, revision)
    except OSError as error:
        raise WorkspaceError(f"{file} cannot be written: {error}; free space or rights?") from None


def _folder(name: str, workspace: Path) -> Path:
    return workspace / "sources" / "hub" / name.replace("/", "--")
