"""A folder in which work goes on, and its copy in the store: what an interrupted stage leaves survives its machine.

Several nodes may work on one folder, each on files of its own. A pass carries what was written here to the store and what
others wrote to this node. Of a file changed in both places the store's version stays: whoever was cut off meanwhile finds
its file replaced. Journals (`*.jsonl`) only grow, so the longer of two that agree stays, and the one here is appended to.
JSON files go last, for they say that what lies beside them is complete.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from pipeline.core.files import atomic_write
from pipeline.storage.objects import ObjectStore

MANIFEST = "manifest.json"
INTERVAL_S = 2.0
# Not more than this part of the time is spent on passes.
_SHARE = 0.2
_AT_ONCE = 8
_JOURNAL = ".jsonl"
# Ray Train looks after its own files.
_NOT_OURS = "ray_train"

Known = dict[str, tuple[str | None, str | None]]


@dataclass(frozen=True)
class Pass:
    """What one pass has to do, by names, in this order within each."""

    pull: tuple[str, ...]
    push: tuple[str, ...]
    drop_here: tuple[str, ...]
    drop_there: tuple[str, ...]


def plan_pass(
    here: Mapping[str, str], there: Mapping[str, str], known: Mapping[str, tuple[str | None, str | None]]
) -> Pass:
    """Compare the marks of files here and there with those that were known to be the same content."""
    pull, push, drop_here, drop_there = [], [], [], []
    for name in sorted({*here, *there, *known}, key=lambda name: (name.endswith(".json"), name)):
        known_here, known_there = known.get(name, (None, None))
        if there.get(name) != known_there:
            if name in there:
                pull.append(name)
            elif name in here:
                drop_here.append(name)
        elif here.get(name) != known_here:
            if name in here:
                push.append(name)
            elif name in there:
                drop_there.append(name)
    return Pass(tuple(pull), tuple(push), tuple(drop_here[::-1]), tuple(drop_there[::-1]))


class Mirror:
    """The folder `folder` and the objects below `prefix`; processes of one node take turns.

    `is_cut_off` says that somebody else has taken the work over; then nothing is carried any more.
    """

    def __init__(
        self, store: ObjectStore, prefix: str, folder: Path, is_cut_off: Callable[[], bool] = lambda: False
    ) -> None:
        self._store, self._prefix, self._folder, self._is_cut_off = store, prefix, folder, is_cut_off
        # In the folder: who deletes the copy deletes what was known of it, and everything is fetched again.
        self._state = folder / ".mirror.json"
        # Threads of a process, and then processes of the node.
        self._turn = threading.Lock()
        self._lock = FileLock(folder.with_name(f".{folder.name}.mirror.lock"), thread_local=False)

    def run_pass(self, store: ObjectStore | None = None) -> None:
        """One pass.

        Raises:
            StorageError: the store does not answer, for longer than its patience.
        """
        if self._is_cut_off():
            return
        store = store or self._store
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._turn, self._lock:
            known, here, there = self._known(), self._marks(), self._versions(store)
            todo = plan_pass(here, there, known)
            longer = {name for name in in_order(self._pull, store, todo.pull) if name}
            in_order(self._push, store, todo.push)
            for name in todo.drop_here:
                self._drop_here(name)
            for name in todo.drop_there:
                store.delete(self._object(name))
            if todo.push or todo.drop_there:
                there = self._versions(store)
            here |= {name: mark for name, mark in self._marks().items() if name in todo.pull}
            dropped = {*todo.drop_here, *todo.drop_there}
            now: Known = {
                name: (None if name in longer else here.get(name), there.get(name))
                for name in {*here, *there} - dropped
            }
            if now != known:
                self._remember(now)
            else:
                self._state.touch()

    @contextmanager
    def running(self) -> Iterator[None]:
        """A pass before the block, one every few seconds within it, and one after it."""
        self.run_pass()
        stop = threading.Event()

        def keep_up() -> None:
            pause, once = INTERVAL_S, self._store.tried_once()
            while not stop.wait(pause):
                started = time.monotonic()
                with suppress(Exception):  # the store is away for a moment: the next pass makes up for it
                    if not self._was_made_just_now():
                        self.run_pass(once)
                pause = max(INTERVAL_S, (time.monotonic() - started) / _SHARE)

        thread = threading.Thread(target=keep_up, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            stop.set()
            thread.join()
            with suppress(Exception):  # what failed says more than a store that is away as well
                self.run_pass(self._store.tried_once())
            raise
        stop.set()
        thread.join()
        self.run_pass()

    def forget(self) -> None:
        """The folder is complete: remove what was remembered about it."""
        self._state.unlink(missing_ok=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _was_made_just_now(self) -> bool:
        try:
            return time.time() - self._state.stat().st_mtime < INTERVAL_S / 2
        except FileNotFoundError:
            return False

    def _object(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _versions(self, store: ObjectStore) -> dict[str, str]:
        return {name: version for name, version in store.versions(self._prefix).items() if name != MANIFEST}

    def _marks(self) -> dict[str, str]:
        marks = {}
        for file in files_below(self._folder):
            with suppress(FileNotFoundError):
                facts = file.stat()
                marks[file.relative_to(self._folder).as_posix()] = f"{facts.st_size} {facts.st_mtime_ns}"
        return marks

    def _push(self, store: ObjectStore, name: str) -> None:
        with suppress(FileNotFoundError):  # removed since the folder was read; the next pass sees it
            store.upload(self._folder / name, self._object(name))

    def _pull(self, store: ObjectStore, name: str) -> str:
        """Bring a file here; returns its name where the one here is longer and has to be pushed instead."""
        file = self._folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(_JOURNAL) and file.exists():
            found = store.read(self._object(name))
            theirs, ours = found[0] if found else b"", file.read_bytes()
            if ours.startswith(theirs):
                return name if ours != theirs else ""
            if theirs.startswith(ours):
                with file.open("ab") as journal:
                    journal.write(theirs[len(ours) :])
                return ""
        with suppress(FileNotFoundError):  # removed since the store was asked
            download(store, self._object(name), file)
        return ""

    def _drop_here(self, name: str) -> None:
        file = self._folder / name
        file.unlink(missing_ok=True)
        for folder in file.parents:
            if folder == self._folder or any(folder.iterdir()):
                break
            folder.rmdir()

    def _known(self) -> Known:
        try:
            remembered = json.loads(self._state.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return {name: (here, there) for name, (here, there) in remembered.items()}

    def _remember(self, known: Known) -> None:
        atomic_write(self._state, json.dumps(known))


def files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder that are worth keeping: neither hidden, nor half written, nor Ray Train's own."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_passing(name) and name != _NOT_OURS]
        yield from (Path(place, name) for name in names if not _is_passing(name) and name != MANIFEST)


def download(store: ObjectStore, name: str, file: Path) -> None:
    """Fetch an object; the file is the old or the new one, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.new")
    try:
        store.download(name, temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def in_order(work: Callable[[ObjectStore, str], str | None], store: ObjectStore, names: Sequence[str]) -> list[str]:
    """Do `work` for all names, several at once, those of JSON files after all others."""
    done: list[str] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for last in (False, True):
            batch = [name for name in names if name.endswith(".json") == last]
            done += [result or "" for result in pool.map(lambda name: work(store, name), batch)]
    return done


def _is_passing(name: str) -> bool:
    return name.startswith(".") or name.endswith((".new", ".lock"))
