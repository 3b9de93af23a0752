"""Leases: mutual exclusion between processes on any number of hosts, and where they are recorded.

A lease has a holder and an expiry, and the holder renews it while it lives. A holder that crashed on this machine is
noticed at once, because its process is gone; one on another machine is noticed when its lease expires. So the clocks of
the hosts must agree to within `CLOCKS_APART_S`. A holder that was suspended past its expiry may have lost the lease to
another process: it calls `Lease.confirm` before it does what only one process may do.

The record of a lease is one small file or object. Two operations are enough: read, and write if nothing was written since.
A shared POSIX file system offers them through link(2), and an object store through conditional puts (`If-None-Match: *` to
create, `If-Match: ETAG` to replace), which keep runs apart on machines that share no disk.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.core import stopping
from pipeline.core.errors import LeaseLostError, WorkspaceError
from pipeline.storage.objects import ObjectStore

# Generations kept besides the newest. A process that read one of them long ago and writes now must find its successor and
# fail. It would have to sleep through this many renewals to find that name free again.
_KEPT = 32

DURATION_S = 120.0
RENEWALS = 6  # within that duration
CLOCKS_APART_S = 30.0
Verdict = Literal["free", "held", "take over"]
Pulse = Literal["alive", "gone", "unknown"]


class Entry(NamedTuple):
    """The state of a record: its content (None if it is absent or was deleted) and its version (None if it never existed)."""

    content: bytes | None
    version: str | None


class LeaseStore(Protocol):
    """Holds one record."""

    def read(self) -> Entry:
        """Read the record."""

    def write(self, content: bytes | None, unchanged: str | None) -> str | None:
        """Create, replace or delete the record, if its version is still `unchanged`.

        Args:
            content: The new content; None to delete the record.
            unchanged: The version that was read.

        Returns:
            The new version; None if another process has written meanwhile.

        Raises:
            WorkspaceError: The store cannot be written.
        """


class FileLeaseStore:
    """A record in a folder of a POSIX file system, local or shared.

    Each write creates a file of its own, `NAME.GENERATION`, by link(2), which is atomic and fails if the name exists, on NFS
    too. So "if unchanged" means "if the next generation does not exist". The highest generation is the record.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._pattern = re.compile(re.escape(name) + r"\.(\d{9})")

    def read(self) -> Entry:
        """Read the record."""
        while True:
            generations = self._generations()
            if not generations:
                return Entry(None, None)
            try:
                content = self._file(generations[-1]).read_bytes()
            except FileNotFoundError:  # deleted meanwhile by a process that wrote many newer ones
                continue
            return Entry(content or None, str(generations[-1]))

    def write(self, content: bytes | None, unchanged: str | None) -> str | None:
        """Write the record as `LeaseStore.write` describes."""
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = int(unchanged or 0) + 1
        temporary = self._folder / f".{self._name}.{uuid.uuid4().hex}"
        with temporary.open("wb") as file:
            file.write(content or b"")
            file.flush()
            os.fsync(file.fileno())
        try:
            if not self._link(temporary, self._file(mine)):
                return None
        finally:
            temporary.unlink()
        generations = self._generations()
        for old in generations[:-_KEPT]:
            self._file(old).unlink(missing_ok=True)
        # If it is not the newest, its name was free only because that generation had been deleted long ago.
        return str(mine) if generations[-1] == mine else None

    def _link(self, temporary: Path, place: Path) -> bool:
        try:
            os.link(temporary, place)
        except FileExistsError:
            # NFS: the reply to a successful link can be lost, and the repeated request then fails.
            return temporary.stat().st_nlink == 2
        except OSError as error:
            raise WorkspaceError(
                f"{place} cannot be made ({error.strerror}); the lock of a retraining needs a workspace that can be "
                "written, on a file system with hard links"
            ) from None
        return True

    def _generations(self) -> list[int]:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        return sorted(int(found[1]) for name in names if (found := self._pattern.fullmatch(name)))

    def _file(self, generation: int) -> Path:
        return self._folder / f"{self._name}.{generation:09d}"


class ObjectLeaseStore:
    """A record in an object store. An empty object is a deleted record."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store, self._name = store, name

    def read(self) -> Entry:
        """Read the record."""
        content, version = self._store.read(self._name) or (b"", None)
        return Entry(content or None, version)

    def write(self, content: bytes | None, unchanged: str | None) -> str | None:
        """Write the record as `LeaseStore.write` describes."""
        if unchanged is None:
            return self._store.create(self._name, content or b"")
        return self._store.replace(self._name, content or b"", unchanged)


# Unix time, up to the year 9999.
_Seconds = Annotated[float, Field(ge=0, le=253402300799)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease.

    Attributes:
        id: Random, new with every acquisition.
        host: The host's name, for people to read.
        machine: The process table that `pid` belongs to; see `this_machine`.
        started: When the process was started, in the kernel's ticks. It tells the process from a later one with its id.
        since, expires: Unix time in seconds.
    """

    id: str
    host: str
    machine: str
    pid: _Count
    started: _Count
    since: _Seconds
    expires: _Seconds

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.pid} on {self.host}, since {since}"


_HOLDER = TypeAdapter(Holder)


def decide(holder: Holder | None, pulse: Pulse, now: float) -> Verdict:
    """Decide whether a lease may be taken.

    Args:
        holder: The recorded holder; None if there is none or the record is unreadable.
        pulse: The state of the holder's process; `unknown` if it runs on another machine.
        now: Unix time in seconds.
    """
    if holder is None:
        return "free"
    if pulse == "gone":
        return "take over"
    # Neither a renewal nor clocks that agree give such a time: the record is damaged, or its writer's clock is wrong.
    if pulse == "unknown" and holder.expires > now + DURATION_S + CLOCKS_APART_S:
        return "take over"
    # A live process on this machine that did not renew hangs or was stopped. No allowance: it has the same clock.
    allowance = 0.0 if pulse == "alive" else CLOCKS_APART_S
    return "take over" if now > holder.expires + allowance else "held"


class Lease:
    """A lease that this process holds. A thread renews it. Obtained from `acquire`."""

    def __init__(self, store: LeaseStore, holder: Holder, version: str, duration_s: float) -> None:
        self.holder = holder
        self._store = store
        self._version: str | None = version
        self._duration_s = duration_s
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether another process is known to have taken the lease over."""
        return self._version is None

    def confirm(self) -> None:
        """Renew the lease now, so that nobody else can take it for the next `duration_s` seconds.

        Raises:
            LeaseLostError: Another process has taken it over.
            OSError: The store cannot be reached.
        """
        with self._turn:
            if self._version is not None:
                renewed = replace(self.holder, expires=time.time() + self._duration_s)
                self._version = self._store.write(_encoded(renewed), self._version)
            if self._version is None:
                self._stop.set()
                new = _decoded(self._store.read())
                raise LeaseLostError(
                    f"this process ({self.holder}) did not renew its lock in time, and it "
                    + (f"was taken over by {new}" if new else "is no longer its own")
                )

    def release(self) -> None:
        """Stop renewing and free the lease. Does nothing if the lease was lost."""
        self._stop.set()
        self._thread.join()
        with self._turn:
            if self._version is not None:
                self._store.write(None, self._version)
                self._version = None

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self._duration_s / RENEWALS):
            try:
                self.confirm()
            except LeaseLostError:
                return
            except Exception:  # the store is unavailable for a moment; a caller of `confirm` gets the error
                continue


def acquire(store: LeaseStore, duration_s: float = DURATION_S) -> Lease | Holder:
    """Take the lease if it is free or its holder is gone.

    Returns:
        The lease, or the process that holds it.

    Raises:
        WorkspaceError: The store cannot be written.
    """
    while True:
        entry = store.read()
        holder = _decoded(entry)
        now = time.time()
        if holder is not None and decide(holder, pulse_of(holder), now) == "held":
            return holder
        mine = Holder(
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=this_machine(),
            pid=os.getpid(),
            started=_start_ticks(os.getpid()) or 0,
            since=now,
            expires=now + duration_s,
        )
        version = store.write(_encoded(mine), entry.version)
        if version is not None:
            return Lease(store, mine, version, duration_s)


@contextmanager
def released_after(lease: Lease) -> Iterator[None]:
    """Release the lease at the end of the block, also after an exception."""
    try:
        with stopping.otherwise(lease.release):
            yield
    finally:
        lease.release()


def pulse_of(holder: Holder) -> Pulse:
    """Whether the holder's process is alive, as far as this machine can see."""
    if holder.machine != this_machine():
        return "unknown"
    started = _start_ticks(holder.pid)
    if started is None:
        return "unknown" if _is_hidden(holder.pid) else "gone"
    return "alive" if started == holder.started else "gone"


def this_machine() -> str:
    """The boot id of this kernel and the id of its process namespace: where both are equal, process ids mean the same.

    Host names cannot serve for this: several containers may share one, or have one each on the same machine.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux: no process can be looked up, and the expiry alone decides
        return f"{socket.gethostname()} {uuid.uuid4().hex}"


def _start_ticks(pid: int) -> int | None:
    """When a process was started, in ticks since boot; None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name in parentheses, which may hold any character.
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def _is_hidden(pid: int) -> bool:
    """Whether the process exists but belongs to another user and `/proc` is mounted with `hidepid`."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _encoded(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _decoded(entry: Entry) -> Holder | None:
    """The recorded holder; None if there is none or the record is damaged."""
    if not entry.content:
        return None
    try:
        return _HOLDER.validate_json(entry.content, strict=True)
    except ValidationError:
        return None
