"""The one door to fsspec: named objects below a URL, with the errors a person can act on and patience for short outages."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from pipeline.core.errors import StorageError, WorkspaceError

Result = TypeVar("Result")

PATIENCE_S = 120.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
# Will not be mended by waiting.
_FINAL = (PermissionError, FileNotFoundError, FileExistsError, NotImplementedError, TypeError, ValueError)
# boto's own time-outs and retries would make a wrong address a matter of minutes.
_S3 = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 0}}}
_OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3}


class ObjectStore:
    """Objects below `url`, by names such as `runs/a.json`. Can be sent to other processes.

    A request that fails for reasons that may pass is repeated for `patience_s` seconds.
    """

    def __init__(self, url: str, patience_s: float = PATIENCE_S) -> None:
        self.url = url.rstrip("/")
        self.patience_s = patience_s

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "patience_s": self.patience_s}

    def check(self, writing: bool = True) -> None:
        """Make sure that objects can be listed here, or written and deleted, at once or not at all.

        Raises:
            WorkspaceError: the package for this kind of storage is missing, it does not answer, or it refuses.
        """
        probe = self._path(f".probe-{uuid4().hex}")
        try:
            if writing:
                self._fs.pipe_file(probe, b"")
                self._fs.rm_file(probe)
            else:
                self._fs.find(probe)
        except WorkspaceError:
            raise
        except Exception as error:
            raise WorkspaceError(f"the workspace {self.url} cannot be used: {_reason(error)}") from error

    def read(self, name: str) -> tuple[bytes, str] | None:
        """An object's content and its version, or None where there is no such object."""
        path = self._path(name)

        def content() -> tuple[bytes, str] | None:
            try:
                version = _version(self._fs.info(path))
                return self._fs.cat_file(path), version
            except FileNotFoundError:
                return None

        return self._patiently(content, f"reading {name}")

    def write(self, name: str, data: bytes) -> None:
        """Write an object, whether it exists or not."""
        self._patiently(lambda: self._fs.pipe_file(self._path(name), data), f"writing {name}")

    def create(self, name: str, data: bytes) -> str | None:
        """Write an object that must not exist, and return its version; None where it does. Of several at once one wins."""
        path = self._path(name)

        def attempt() -> str | None:
            try:
                return self._version_of(path, self._fs.pipe_file(path, data, mode="create"))
            except FileExistsError:
                return self._if_ours(name, data)

        return self._patiently(attempt, f"creating {name}")

    def replace(self, name: str, data: bytes, version: str) -> str | None:
        """Write an object if it still is at `version`, and return the new version; None otherwise.

        On S3 of several at once one wins. Elsewhere there is a moment between the look and the writing.
        """
        path = self._path(name)

        def attempt() -> str | None:
            if not self._is_s3 and (self.read(name) or (b"", None))[1] != version:
                return self._if_ours(name, data)
            try:
                condition = {"IfMatch": version} if self._is_s3 else {}
                return self._version_of(path, self._fs.pipe_file(path, data, **condition))
            except OSError as error:
                if isinstance(error, FileNotFoundError) or "pre-condition" in str(error).lower():
                    return self._if_ours(name, data)
                raise

        return self._patiently(attempt, f"replacing {name}")

    def _if_ours(self, name: str, data: bytes) -> str | None:
        """The version, if the object holds `data`: an attempt whose answer was lost may have succeeded."""
        found = self.read(name)
        return found[1] if found and found[0] == data else None

    def _version_of(self, path: str, answer: Any) -> str:
        return _version(answer if isinstance(answer, dict) and "ETag" in answer else self._fs.info(path))

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""

        def attempt() -> None:
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

        self._patiently(attempt, f"deleting {name}")

    def versions(self, prefix: str) -> dict[str, str]:
        """The version of every object below `prefix`, by its name there."""
        root = self._path(prefix)

        def listing() -> dict[str, str]:
            try:
                found = self._fs.find(root, detail=True)
            except FileNotFoundError:
                return {}
            return {path.removeprefix(root).lstrip("/"): _version(info) for path, info in found.items()}

        return self._patiently(listing, f"listing {prefix}")

    def upload(self, file: Path, name: str) -> None:
        """Write a file's content to an object.

        Raises:
            FileNotFoundError: there is no such file any more.
        """
        self._patiently(lambda: self._fs.put_file(str(file), self._path(name)), f"uploading {name}")

    def download(self, name: str, file: Path) -> None:
        """Write an object's content to a file.

        Raises:
            FileNotFoundError: there is no such object.
        """
        self._patiently(lambda: self._fs.get_file(self._path(name), str(file)), f"downloading {name}")

    def copy(self, name: str, new_name: str) -> None:
        """Copy an object within the store."""
        self._patiently(lambda: self._fs.cp_file(self._path(name), self._path(new_name)), f"copying {name}")

    def tried_once(self) -> ObjectStore:
        """The same store without patience: for whoever will ask again anyway."""
        once = ObjectStore(self.url, 0)
        once.__dict__["_fs"] = self._fs
        return once

    @cached_property
    def _fs(self) -> Any:
        return _filesystem(self.url)

    @property
    def _is_s3(self) -> bool:
        return self.url.startswith(("s3://", "s3a://"))

    def _path(self, name: str) -> str:
        return f"{self._fs._strip_protocol(self.url)}/{name}".rstrip("/")

    def _patiently(self, request: Callable[[], Result], what: str) -> Result:
        deadline, pause = time.monotonic() + self.patience_s, _FIRST_PAUSE_S
        while True:
            try:
                return request()
            except (WorkspaceError, StorageError):
                raise
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:
                left_s = deadline - time.monotonic()
                if isinstance(error, _FINAL) or left_s <= 0:
                    raise StorageError(f"{self.url}: {what} failed: {_reason(error)}") from error
            time.sleep(min(pause, left_s))
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _filesystem(url: str) -> Any:
    """The fsspec file system of a URL.

    Raises:
        WorkspaceError: unknown, or its package is not installed.
    """
    import fsspec
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        return fsspec.filesystem(
            protocol, use_listings_cache=False, skip_instance_cache=True, **_OPTIONS.get(protocol, {})
        )
    except ImportError as error:
        package = str(known_implementations.get(protocol, {}).get("class", error.name)).partition(".")[0]
        raise WorkspaceError(
            f"the workspace {url} needs a package that is not installed: pip install {package}"
        ) from error
    except ValueError as error:
        if protocol in known_implementations:
            raise WorkspaceError(f"the workspace {url} cannot be used: {_reason(error)}") from error
        raise WorkspaceError(
            f"the workspace {url} is on no known kind of storage ({protocol}://); name a folder, or s3://BUCKET/FOLDER"
        ) from None


def _version(info: dict[str, Any]) -> str:
    """What changes whenever an object is written anew: the store's own mark, or size and time."""
    if mark := info.get("ETag") or info.get("etag") or info.get("md5Hash"):
        return str(mark)
    times = ("mtime", "modified", "created", "LastModified", "updated")
    changed = next((info[name] for name in times if name in info), "")
    # Where a listing gives seconds, a look at the object may give a date.
    return f"{info.get('size')} {changed.timestamp() if isinstance(changed, datetime) else changed}"


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError) and "bucket" in text.lower():
        return f"{text}; create the bucket first, or correct its name"
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return f"{text}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, PermissionError):
        return f"refused ({text}); check the credentials and what they allow"
    if type(error).__name__ in ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"):
        return f"{text}; check the network, and AWS_ENDPOINT_URL where the store is not Amazon's"
    return text
