"""Work on other nodes: the paths that a job names exist there before it begins, and what it writes comes back.

The workspace as the pipeline sees it: a folder of this node, and behind it, where the recipe names a URL, a store.

A workspace in a folder is that folder and nothing more. One in a store has a folder on every node that works on it, below
`$KASA_CACHE` (`~/.cache/kasa`). What is complete in the store is the truth, the folders are copies:

    artifacts/STAGE/KEY/...           complete if and only if `manifest.json` is there
    artifacts/STAGE/KEY.partial/...   work in progress
    leases/STAGE/KEY                  who is at it
    inputs/DIGEST/...                 base and data for the other nodes of a cluster, complete with `.complete`
    runs/, reports/                   small files
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar
from uuid import uuid4

from filelock import FileLock

from pipeline.core.errors import StorageError, WorkspaceError
from pipeline.core.files import ARTIFACTS, COMPLETE, INPUTS, PARTIAL, atomic_write, is_remote, local_folder
from pipeline.storage.lease import Holder, Lease, acquire, released_after
from pipeline.storage.lease_stores import ObjectLeaseStore
from pipeline.storage.mirror import MANIFEST, Mirror, download, files_below, in_order
from pipeline.storage.objects import ObjectStore

Result = TypeVar("Result")


class OnNode(Generic[Result]):
    """A function of a job, to be sent to another node; `home` is the workspace of the node that sends it."""

    def __init__(self, home: Workspace, function: Callable[..., Result]) -> None:
        self._home, self._function = home, function

    def __call__(self, job: Any, *others: Any) -> Result:
        home, here = self._home, self._home.here()
        moved = replace_paths(job, lambda path: home.path_on(here, path))
        with ExitStack() as mirrors:
            for folder in [] if here.is_same_node(home) else sorted(_units(moved, here.folder)):
                if folder.name.endswith(PARTIAL):
                    mirrors.enter_context(here.mirrored(folder, None))
                else:
                    here.fetch(folder, COMPLETE if folder.parent.name == INPUTS else MANIFEST)
            return self._function(moved, *others)


def replace_paths(value: Any, change: Callable[[Path], Path]) -> Any:
    """`value` with every path changed, in dataclasses, tuples, lists and dictionaries too."""
    if isinstance(value, Path):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        new = {name: replace_paths(one, change) for name, one in old.items()}
        return dataclasses.replace(value, **new) if any(new[name] is not old[name] for name in old) else value
    if isinstance(value, list | tuple):
        changed = [replace_paths(one, change) for one in value]
        same = all(new is old for new, old in zip(changed, value, strict=True))
        return value if same else type(value)(changed)
    if isinstance(value, dict):
        return {name: replace_paths(one, change) for name, one in value.items()}
    return value


def _units(job: Any, root: Path) -> set[Path]:
    """The folders that are fetched or mirrored as a whole: those in which the paths of a job lie."""
    units: set[Path] = set()

    def note(path: Path) -> Path:
        parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
        if parts and parts[0] == ARTIFACTS and len(parts) >= 3:
            units.add(root.joinpath(*parts[:3]))
        elif parts and parts[0] == INPUTS and len(parts) >= 2:
            units.add(root.joinpath(*parts[:2]))
        return path

    replace_paths(job, note)
    return units


Place = Path | str
# Tells one node's copy from another's.
_NODE = ".node"
_LOOK_S = 1.0


def open_workspace(place: Place) -> Workspace:
    """The workspace of a recipe, to be written.

    Raises:
        WorkspaceError: its store cannot be used, or MLflow would have no place.
    """
    workspace = _at(place)
    if workspace.store:
        workspace.store.check()
    return workspace


def look_into(place: Place) -> Workspace:
    """The workspace of a recipe, to be read; errors as for `open_workspace`."""
    workspace = _at(place)
    if workspace.store:
        workspace.store.check(writing=False)
    return workspace


def _at(place: Place) -> Workspace:
    folder = local_folder(place)
    if not is_remote(place):
        return Workspace(folder)
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if "://" not in server or server.startswith(("sqlite:", "file:")):
        raise WorkspaceError(
            f"the workspace {place} cannot hold MLflow's database; start an MLflow server and name it with "
            "MLFLOW_TRACKING_URI=http://HOST:PORT"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".node.lock"):
            node = folder / _NODE
            if not node.exists():
                node.write_text(uuid4().hex, encoding="ascii")
    except OSError as error:
        raise WorkspaceError(
            f"{folder}, where this machine keeps its copy of {place}, cannot be written ({error.strerror}); "
            "name another place with KASA_CACHE=FOLDER"
        ) from None
    return Workspace(folder, ObjectStore(str(place)), node.read_text(encoding="ascii"))


class Workspace:
    """A workspace on one node; its methods do nothing where there is no store behind it. Can be sent to other nodes.

    Attributes:
        folder: its folder on this node.
        store: what is behind it; None where the folder is all.
    """

    def __init__(self, folder: Path, store: ObjectStore | None = None, node: str = "") -> None:
        self.folder = folder
        self.store = store
        self._node = node
        self._inputs: dict[Path, str] = {}
        self._mirrors: list[Mirror] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mirrors": []}

    def address(self, path: Path) -> str:
        """What a person may look for: the URL of something in the store, else the path."""
        if self.store is None or not path.is_relative_to(self.folder):
            return str(path)
        return f"{self.store.url}/{self._name(path)}"

    def fetch(self, folder: Path, mark: str = MANIFEST) -> None:
        """Make a folder that is complete in the store, as `mark` says, exist here and be the same; else remove it here."""
        if self.store is None:
            return
        name = self._name(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.fetch.lock")):
            found = self.store.read(f"{name}/{mark}")
            if found is None:
                if folder.exists():
                    _remove(folder)
                return
            if not (folder / mark).exists() or (folder / mark).read_bytes() != found[0]:
                self._fetch_all(name, folder, mark, found[0])

    def _fetch_all(self, name: str, folder: Path, mark: str, content: bytes) -> None:
        assert self.store is not None
        new = folder.with_name(f".{folder.name}.fetch{PARTIAL}")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        files = [file for file in self.store.versions(name) if file != mark]
        try:
            in_order(lambda store, file: download(store, f"{name}/{file}", new / file), self.store, files)
        except FileNotFoundError as error:
            raise StorageError(f"{self.store.url}/{name} was removed while it was fetched; run again") from error
        (new / mark).write_bytes(content)
        if folder.exists():
            _remove(folder)
        os.replace(new, folder)

    @contextmanager
    def leased(self, folder: Path, on_wait: Callable[[str], None]) -> Iterator[Lease | None]:
        """Within the block no other run, on whatever machine, makes the artifact of this folder.

        `on_wait` is told who has it first, if somebody has.
        """
        if self.store is None:
            yield None
            return
        name = self._name(folder).replace(ARTIFACTS, "leases", 1)
        records, waited = ObjectLeaseStore(self.store, name), False
        while isinstance(lease := acquire(records), Holder):
            if not waited:
                waited = True
                on_wait(str(lease))
            time.sleep(_LOOK_S)
        with released_after(lease):
            yield lease

    @contextmanager
    def mirrored(self, partial: Path, lease: Lease | None) -> Iterator[None]:
        """Within the block work in `partial` is in the store a few seconds later; what lies there already is fetched."""
        if self.store is None:
            yield
            return
        mirror = self._mirror(partial, lambda: lease is not None and lease.is_lost)
        with mirror.running():
            self._mirrors.append(mirror)
            try:
                yield
            finally:
                self._mirrors.remove(mirror)

    @contextmanager
    def synced(self) -> Iterator[None]:
        """Within the block other nodes work: they have what was written here before, and what they wrote is here after."""
        self.catch_up()
        yield
        self.catch_up()

    def catch_up(self) -> None:
        """Let other nodes have what was written here, and have what they wrote, in all folders with work in progress."""
        for mirror in list(self._mirrors):
            mirror.run_pass()

    def publish(self, partial: Path, folder: Path, lease: Lease | None) -> None:
        """What was mirrored is complete, with the manifest in `partial`, and takes the place of what the store had.

        Raises:
            LeaseLostError: another run has taken this work over.
        """
        if self.store is None:
            return
        if lease:
            lease.confirm()
        self.remove(folder)
        source, target = self._name(partial), self._name(folder)
        in_order(
            lambda store, file: store.copy(f"{source}/{file}", f"{target}/{file}"),
            self.store,
            list(self.store.versions(source)),
        )
        self.store.upload(partial / MANIFEST, f"{target}/{MANIFEST}")
        self.remove(partial)
        self._mirror(partial).forget()

    def remove(self, folder: Path) -> None:
        """Remove an artifact from the store, first that which says it is complete."""
        if self.store is None:
            return
        name = self._name(folder)
        self.store.delete(f"{name}/{MANIFEST}")
        in_order(lambda store, file: store.delete(f"{name}/{file}"), self.store, list(self.store.versions(name)))

    def load(self, file: Path) -> None:
        """Make a small file be here what it is in the store; without one there, there is none here."""
        if self.store is None:
            return
        found = self.store.read(self._name(file))
        if found is None:
            file.unlink(missing_ok=True)
            return
        atomic_write(file, found[0])

    def save(self, file: Path) -> None:
        """Put a small file that was written here into the store."""
        if self.store is not None:
            self.store.write(self._name(file), file.read_bytes())

    def discard(self, file: Path) -> None:
        """Remove a small file, here and in the store."""
        file.unlink(missing_ok=True)
        if self.store is not None:
            self.store.delete(self._name(file))

    def lease_store(self, name: str) -> ObjectLeaseStore | None:
        """A record for a lease of its own; None where the workspace is a folder."""
        return ObjectLeaseStore(self.store, name) if self.store else None

    def upload_input(self, path: Path, digest: str) -> None:
        """Let other nodes of a cluster have a file or folder of this one, known by the digest of its content.

        A Ray of this machine alone has no other nodes, and nothing is copied.
        """
        if self.store is None or not os.environ.get("RAY_ADDRESS"):
            return
        path, name = path.resolve(), f"{INPUTS}/{digest[:32]}"
        self._inputs[path] = name if path.is_dir() else f"{name}/{path.name}"
        if self.store.read(f"{name}/{COMPLETE}") is not None:
            return
        root = path if path.is_dir() else path.parent
        files = [str(file.relative_to(root)) for file in (files_below(path) if path.is_dir() else [path])]
        in_order(lambda store, file: store.upload(root / file, f"{name}/{file}"), self.store, files)
        self.store.write(f"{name}/{COMPLETE}", digest.encode())

    def on_node(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """`function(job, ...)` for a worker on whatever node: the paths in `job` exist there, and what is written returns."""
        return function if self.store is None else OnNode(self, function)

    def here(self) -> Workspace:
        """The same workspace on the node of this process."""
        assert self.store is not None
        folder = local_folder(self.store.url)
        try:
            node = (folder / _NODE).read_text(encoding="ascii")
        except FileNotFoundError:
            node = ""
        return Workspace(folder, self.store, node)

    def is_same_node(self, other: Workspace) -> bool:
        """Whether both are the same folder, however it is called."""
        return self._node == other._node

    def path_on(self, other: Workspace, path: Path) -> Path:
        """What a path of this node is on another one."""
        for shared, name in () if self.is_same_node(other) else self._inputs.items():
            if path.is_relative_to(shared):
                return other.folder / name / path.relative_to(shared)
        return other.folder / path.relative_to(self.folder) if path.is_relative_to(self.folder) else path

    def _mirror(self, partial: Path, is_cut_off: Callable[[], bool] = lambda: False) -> Mirror:
        assert self.store is not None
        return Mirror(self.store, self._name(partial), partial, is_cut_off)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def _remove(folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.{uuid4().hex}.old")
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
