"""The one door to fsspec: named objects below a URL.

Requests that fail for a passing reason are retried, and errors say what a person can do about them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from pipeline.core.errors import StorageError, WorkspaceError, one_line
from pipeline.core.machine import backoff_s

Result = TypeVar("Result")

RETRY_S = 120.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
# Retrying does not help against these. NotImplementedError is how fsspec says that a file system lacks an operation.
_FINAL = (PermissionError, FileNotFoundError, FileExistsError, NotImplementedError, TypeError, ValueError)
# With boto's own time-outs and retries it would take minutes to notice a wrong address.
_S3 = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 0}}}
_OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3}


class ObjectStore:
    """Objects below `url`, by names such as `runs/a.json`. Can be pickled.

    A request that fails for a reason that may pass is retried for `retry_s` seconds. All methods but `check` then raise
    StorageError.
    """

    def __init__(self, url: str, retry_s: float = RETRY_S) -> None:
        self.url = url.rstrip("/")
        self.retry_s = retry_s

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "retry_s": self.retry_s}  # each process opens a connection of its own

    def check(self, writing: bool = True) -> None:
        """Make sure that objects can be written and deleted, or only listed. Nothing is retried.

        Raises:
            WorkspaceError: The package for this kind of storage is missing, or the store does not answer, or it refuses.
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
        """An object's content and version; None if there is no such object."""
        path = self._path(name)

        def content() -> tuple[bytes, str] | None:
            try:
                version = _version(self._fs.info(path))
                return self._fs.cat_file(path), version
            except FileNotFoundError:
                return None

        return self._retry(content, f"reading {name}")

    def write(self, name: str, data: bytes) -> None:
        """Create or overwrite an object."""
        self._retry(lambda: self._fs.pipe_file(self._path(name), data), f"writing {name}")

    def create(self, name: str, data: bytes) -> str | None:
        """Create an object and return its version; None if it exists already. Of several concurrent writers one wins."""
        path = self._path(name)

        def attempt() -> str | None:
            try:
                return self._version_of(path, self._fs.pipe_file(path, data, mode="create"))
            except FileExistsError:
                return self._if_ours(name, data)

        return self._retry(attempt, f"creating {name}")

    def replace(self, name: str, data: bytes, version: str) -> str | None:
        """Overwrite an object if it still has this version, and return the new version; None otherwise.

        On S3 the condition is part of the request, so of several concurrent writers one wins. Elsewhere the version is
        compared first, and another writer may come in between.
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

        return self._retry(attempt, f"replacing {name}")

    def _if_ours(self, name: str, data: bytes) -> str | None:
        """The object's version if it holds `data`, because an earlier attempt whose reply was lost may have succeeded."""
        found = self.read(name)
        return found[1] if found and found[0] == data else None

    def _version_of(self, path: str, answer: Any) -> str:
        return _version(answer if isinstance(answer, dict) and "ETag" in answer else self._fs.info(path))

    def delete(self, name: str) -> None:
        """Delete an object if it exists."""

        def attempt() -> None:
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

        self._retry(attempt, f"deleting {name}")

    def versions(self, prefix: str) -> dict[str, str]:
        """The version of every object below `prefix`, by its name relative to `prefix`."""
        root = self._path(prefix)

        def listing() -> dict[str, str]:
            try:
                found = self._fs.find(root, detail=True)
            except FileNotFoundError:
                return {}
            return {path.removeprefix(root).lstrip("/"): _version(info) for path, info in found.items()}

        return self._retry(listing, f"listing {prefix}")

    def upload(self, file: Path, name: str) -> None:
        """Write the content of a file to an object.

        Raises:
            FileNotFoundError: There is no such file.
        """
        self._retry(lambda: self._fs.put_file(str(file), self._path(name)), f"uploading {name}")

    def download(self, name: str, file: Path) -> None:
        """Write the content of an object to a file.

        Raises:
            FileNotFoundError: There is no such object.
        """
        self._retry(lambda: self._fs.get_file(self._path(name), str(file)), f"downloading {name}")

    def copy(self, name: str, new_name: str) -> None:
        """Copy an object within the store."""
        self._retry(lambda: self._fs.cp_file(self._path(name), self._path(new_name)), f"copying {name}")

    def without_retries(self) -> ObjectStore:
        """The same store for a caller that repeats its requests anyway: each is tried once."""
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

    def _retry(self, request: Callable[[], Result], what: str) -> Result:
        deadline = time.monotonic() + self.retry_s
        for pause_s in backoff_s(_FIRST_PAUSE_S, _LONGEST_PAUSE_S):
            try:
                return request()
            except (WorkspaceError, StorageError, FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # every kind of store raises types of its own
                left_s = deadline - time.monotonic()
                if isinstance(error, _FINAL) or left_s <= 0:
                    raise StorageError(f"{self.url}: {what} failed: {_reason(error)}") from error
            time.sleep(min(pause_s, left_s))
        raise AssertionError("the pauses never end")


def _filesystem(url: str) -> Any:
    """The fsspec file system of a URL.

    Raises:
        WorkspaceError: fsspec does not know this kind of storage, or its package is not installed.
    """
    import fsspec
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        return fsspec.filesystem(
            # A cached listing would hide what other nodes have written.
            protocol,
            use_listings_cache=False,
            skip_instance_cache=True,
            **_OPTIONS.get(protocol, {}),
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
    """A text that changes whenever the object is overwritten: the store's ETag or hash, or else size and time."""
    if mark := info.get("ETag") or info.get("etag") or info.get("md5Hash"):
        return str(mark)
    times = ("mtime", "modified", "created", "LastModified", "updated")
    changed = next((info[name] for name in times if name in info), "")
    # A listing may give seconds where the information on a single object gives a date.
    return f"{info.get('size')} {changed.timestamp() if isinstance(changed, datetime) else changed}"


def _reason(error: BaseException) -> str:
    text = one_line(error, limit=1000)
    if isinstance(error, FileNotFoundError) and "bucket" in text.lower():
        return f"{text}; create the bucket first, or correct its name"
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return f"{text}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, PermissionError):
        return f"refused ({text}); check the credentials and what they allow"
    if type(error).__name__ in ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"):
        return f"{text}; check the network, and AWS_ENDPOINT_URL where the store is not Amazon's"
    return text
