"""Mirroring of a folder with work in progress to the store, so that the work of an interrupted stage outlives its machine.

Several nodes may work on one folder, each on files of its own. One pass uploads what was written here and downloads what
other nodes wrote. If a file changed in both places, the store's version wins: a worker whose work was taken over meanwhile
finds its file replaced. Journals (`*.jsonl`) only grow, so of two journals that agree the longer one wins, and the local
one is appended to in place. JSON files come last, because they say that the files beside them are complete.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from kasa.errors import DamagedFileError
from kasa.files import read_sealed_json, replacing, sealed_json
from pipeline.core.files import atomic_write
from pipeline.core.machine import in_background
from pipeline.storage.objects import ObjectStore

MANIFEST = "manifest.json"
INTERVAL_S = 2.0
# Passes take at most this share of the time.
_SHARE = 0.2
_CONCURRENT_REQUESTS = 8
_JOURNAL = ".jsonl"
# What a mirror knows of a folder.
_STATE = ".mirror.json"
# Ray Train synchronises its own files.
_NOT_OURS = "ray_train"

# Name -> the marks of the file here and of the object in the store when both had the same content.
Known = dict[str, tuple[str | None, str | None]]


@dataclass(frozen=True)
class Pass:
    """The names of the files that one pass has to transfer or delete. Each list is in the order to be followed."""

    pull: tuple[str, ...]
    push: tuple[str, ...]
    drop_here: tuple[str, ...]
    drop_there: tuple[str, ...]


def plan_pass(
    here: Mapping[str, str], there: Mapping[str, str], known: Mapping[str, tuple[str | None, str | None]]
) -> Pass:
    """Decide what a pass has to do. A mark changes whenever its file does.

    Args:
        here: Name -> mark of the files in the folder.
        there: Name -> mark of the objects in the store.
        known: The marks that both had when their content was last known to be the same.
    """
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
    """Keeps the folder `folder` and the objects below `prefix` the same. The processes of one node take turns.

    `is_cut_off` says whether another run has taken the work over. From then on nothing is transferred.
    """

    def __init__(
        self, store: ObjectStore, prefix: str, folder: Path, is_cut_off: Callable[[], bool] = lambda: False
    ) -> None:
        self._store, self._prefix, self._folder, self._is_cut_off = store, prefix, folder, is_cut_off
        # In the folder itself, so that deleting the copy also deletes what was known of it.
        self._state = folder / _STATE
        # Threads of a process, and then processes of the node.
        self._turn = threading.Lock()
        self._lock = FileLock(folder.with_name(f".{folder.name}.mirror.lock"), thread_local=False)

    def run_pass(self, store: ObjectStore | None = None) -> None:
        """Transfer in both directions what has changed since the last pass.

        Raises:
            StorageError: The store failed for longer than its requests are retried.
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
        """Run a pass before the block, one every few seconds during it, and one after it."""
        self.run_pass()
        once = self._store.without_retries()

        def keep_up(stop: threading.Event) -> None:
            pause = INTERVAL_S
            while not stop.wait(pause):
                started = time.monotonic()
                with suppress(Exception):  # the store is unavailable for a moment: the next pass makes up for it
                    if not self._was_passed_just_now():
                        self.run_pass(once)
                pause = max(INTERVAL_S, (time.monotonic() - started) / _SHARE)

        try:
            with in_background(keep_up):
                yield
        except BaseException:
            with suppress(Exception):  # the first error says more than that the store is unavailable too
                self.run_pass(once)
            raise
        self.run_pass()

    def forget(self) -> None:
        """Delete what was remembered about the folder, now that it is complete."""
        self._state.unlink(missing_ok=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _was_passed_just_now(self) -> bool:
        """Whether a pass of another process of this node, or one for a worker, ended moments ago."""
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
        with suppress(FileNotFoundError):  # deleted since the folder was read; the next pass sees it
            store.upload(self._folder / name, self._object(name))

    def _pull(self, store: ObjectStore, name: str) -> str:
        """Download a file. Returns its name if the local journal is longer and has to be uploaded instead, else an empty string."""
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
        with suppress(FileNotFoundError):  # deleted since the store was listed
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
            remembered = read_sealed_json(self._state)
        except (FileNotFoundError, DamagedFileError):
            return {}
        return {name: (here, there) for name, (here, there) in remembered["known"].items()}

    def _remember(self, known: Known) -> None:
        atomic_write(self._state, sealed_json({"known": known}))


def files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder that are mirrored: all but the manifest, hidden or half-written files, and those of Ray Train."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_temporary(name) and name != _NOT_OURS]
        yield from (Path(place, name) for name in names if not _is_temporary(name) and name != MANIFEST)


def discard_work(folder: Path) -> None:
    """Delete the work in progress in a folder; the next pass of its mirror deletes it in the store."""
    for entry in folder.iterdir():
        if entry.name == _STATE:  # without it a pass would take what the store still has for news
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def download(store: ObjectStore, name: str, file: Path) -> None:
    """Download an object to a file in one step.

    Raises:
        FileNotFoundError: There is no such object.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as new:
        store.download(name, new)


def in_order(work: Callable[[ObjectStore, str], str | None], store: ObjectStore, names: Sequence[str]) -> list[str]:
    """Do `work` for all names, several at a time, and for JSON files only after all others. Returns the results, "" for None."""
    done: list[str] = []
    with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
        for last in (False, True):
            batch = [name for name in names if name.endswith(".json") == last]
            done += [result or "" for result in pool.map(lambda name: work(store, name), batch)]
    return done


def _is_temporary(name: str) -> bool:
    return name.startswith(".") or name.endswith((".new", ".lock"))
