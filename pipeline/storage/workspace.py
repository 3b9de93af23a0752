"""The workspace of a run: a folder on this node and, if the recipe names a URL, an object store behind it.

A workspace without a store is that folder and nothing more. A workspace with a store has a folder on every node that works
on it, below `$KASA_CACHE` (`~/.cache/kasa`). The store holds the authoritative version, and the folders are copies of it:

    artifacts/STAGE/KEY/...           complete if and only if `manifest.json` exists
    artifacts/STAGE/KEY.partial/...   work in progress
    leases/STAGE/KEY                  the run that is working on it
    inputs/DIGEST/...                 base and data for the other nodes of a cluster, complete with `.complete`
    runs/, reports/                   small files

Workers on other nodes get the folders that their jobs name, and what they write comes back (`Workspace.on_node`).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar
from uuid import uuid4

from filelock import FileLock

from kasa.files import remove_folder, replacing
from pipeline.core.errors import StorageError, WorkspaceError
from pipeline.core.files import ARTIFACTS, COMPLETE, INPUTS, PARTIAL, atomic_write, is_remote, local_folder
from pipeline.storage.lease import Holder, Lease, ObjectLeaseStore, acquire, released_after
from pipeline.storage.mirror import MANIFEST, Mirror, download, files_below, in_order
from pipeline.storage.objects import ObjectStore

Result = TypeVar("Result")

Location = Path | str

# Holds a random id by which the copy on one node is told from that on another.
_NODE = ".node"
_LEASE_POLL_S = 1.0


def open_workspace(location: Location) -> Workspace:
    """The workspace of a recipe, for reading and writing.

    Raises:
        WorkspaceError: Its store cannot be used, or it is remote and no MLflow server is named.
    """
    workspace = _at(location)
    if workspace.store:
        workspace.store.check()
    return workspace


def look_into(location: Location) -> Workspace:
    """The workspace of a recipe, for reading only. Raises as `open_workspace` does."""
    workspace = _at(location)
    if workspace.store:
        workspace.store.check(writing=False)
    return workspace


def check_location(location: Location) -> None:
    """Ask the store of a workspace, if there is one, whether it lets itself be read. Raises as `open_workspace` does."""
    if is_remote(location):
        _require_server(location)
        ObjectStore(str(location)).check(writing=False)


def _require_server(location: Location) -> None:
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if "://" not in server or server.startswith(("sqlite:", "file:")):
        raise WorkspaceError(
            f"the workspace {location} cannot hold MLflow's database; start an MLflow server and name it with "
            "MLFLOW_TRACKING_URI=http://HOST:PORT"
        )


def _at(location: Location) -> Workspace:
    folder = local_folder(location)
    if not is_remote(location):
        return Workspace(folder)
    _require_server(location)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".node.lock"):
            node = folder / _NODE
            if not node.exists():
                atomic_write(node, uuid4().hex)
    except OSError as error:
        raise WorkspaceError(
            f"{folder}, where this machine keeps its copy of {location}, cannot be written ({error.strerror}); "
            "name another place with KASA_CACHE=FOLDER"
        ) from None
    return Workspace(folder, ObjectStore(str(location)), node.read_text(encoding="ascii"))


class Workspace:
    """A workspace as one node sees it. Without a store, methods that synchronise do nothing. Can be pickled.

    Attributes:
        folder: Its folder on this node.
        store: The object store behind it; None if there is only the folder.
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
        """Where a person finds this path: its URL in the store if there is one, else the path itself."""
        if self.store is None or not path.is_relative_to(self.folder):
            return str(path)
        return f"{self.store.url}/{self._name(path)}"

    def fetch(self, folder: Path, mark: str = MANIFEST) -> None:
        """Download a folder from the store unless the local copy is current. Delete the copy if the store has no such folder.

        Args:
            mark: The file that says the folder is complete. The copy is current if this file has the same content here.

        Raises:
            StorageError: The store failed, or the folder was deleted during the download.
        """
        if self.store is None:
            return
        name = self._name(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.fetch.lock")):
            found = self.store.read(f"{name}/{mark}")
            if found is None:
                if folder.exists():
                    remove_folder(folder)
                return
            if not (folder / mark).exists() or (folder / mark).read_bytes() != found[0]:
                self._fetch_all(name, folder, mark, found[0])

    def _fetch_all(self, name: str, folder: Path, mark: str, content: bytes) -> None:
        assert self.store is not None
        with replacing(folder, exclusive=True) as new:
            new.mkdir()
            files = [file for file in self.store.versions(name) if file != mark]
            try:
                in_order(lambda store, file: download(store, f"{name}/{file}", new / file), self.store, files)
            except FileNotFoundError as error:
                raise StorageError(f"{self.store.url}/{name} was removed while it was fetched; run again") from error
            (new / mark).write_bytes(content)

    @contextmanager
    def leased(self, folder: Path, on_wait: Callable[[str], None]) -> Iterator[Lease | None]:
        """During the block no other run on any machine makes the artifact of this folder, or whatever else has this name.

        Waits for the lease as long as another run holds it.

        Args:
            on_wait: Called once with a description of the holder, if there is one.
        """
        if self.store is None:
            yield None
            return
        name = f"leases/{self._name(folder).removeprefix(f'{ARTIFACTS}/')}"
        records, waited = ObjectLeaseStore(self.store, name), False
        while isinstance(lease := acquire(records), Holder):
            if not waited:
                waited = True
                on_wait(str(lease))
            time.sleep(_LEASE_POLL_S)
        with released_after(lease):
            yield lease

    @contextmanager
    def mirrored(self, partial: Path, lease: Lease | None) -> Iterator[None]:
        """Download earlier work on `partial` from the store; during the block upload new work within a few seconds."""
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
        """Run workers of other nodes in the block: they see all files written here before it, and their files are here after it."""
        self.catch_up()
        yield
        self.catch_up()

    def catch_up(self) -> None:
        """Exchange what was written with the other nodes, in all folders with work in progress."""
        for mirror in list(self._mirrors):
            mirror.run_pass()

    def publish(self, partial: Path, folder: Path, lease: Lease | None) -> None:
        """Make the mirrored work in `partial`, which now has its manifest, the artifact `folder` of the store.

        The manifest is uploaded last, so that the artifact is absent or complete at any time.

        Raises:
            LeaseLostError: Another run has taken this work over.
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
        """Delete an artifact from the store. The manifest goes first, so that no half of it ever looks complete."""
        if self.store is None:
            return
        name = self._name(folder)
        self.store.delete(f"{name}/{MANIFEST}")
        in_order(lambda store, file: store.delete(f"{name}/{file}"), self.store, list(self.store.versions(name)))

    def load(self, file: Path) -> None:
        """Download a small file from the store. Delete the local copy if the store has none."""
        if self.store is None:
            return
        found = self.store.read(self._name(file))
        if found is None:
            file.unlink(missing_ok=True)
            return
        atomic_write(file, found[0])

    def save(self, file: Path) -> None:
        """Upload a small file to the store."""
        if self.store is not None:
            self.store.write(self._name(file), file.read_bytes())

    def discard(self, file: Path) -> None:
        """Delete a small file, here and in the store."""
        file.unlink(missing_ok=True)
        if self.store is not None:
            self.store.delete(self._name(file))

    def lease_store(self, name: str) -> ObjectLeaseStore | None:
        """The record of a lease of this name in the store; None if there is no store."""
        return ObjectLeaseStore(self.store, name) if self.store else None

    def upload_input(self, path: Path, digest: str, check: Callable[[], object]) -> None:
        """Upload a file or folder of this node for the other nodes of the cluster, once for each digest of its content.

        Nothing is uploaded if Ray runs on this machine only.

        Args:
            check: Raises if what lies at `path` is not what the digest stands for. It is asked when everything is uploaded:
                what changed meanwhile must not count as complete, for later runs would take it unseen.
        """
        if self.store is None or os.environ.get("RAY_ADDRESS", "") in ("", "local"):
            return
        path, name = path.resolve(), f"{INPUTS}/{digest[:32]}"
        self._inputs[path] = name if path.is_dir() else f"{name}/{path.name}"
        if self.store.read(f"{name}/{COMPLETE}") is not None:
            return
        root = path if path.is_dir() else path.parent
        files = [str(file.relative_to(root)) for file in (files_below(path) if path.is_dir() else [path])]
        in_order(lambda store, file: store.upload(root / file, f"{name}/{file}"), self.store, files)
        check()
        self.store.write(f"{name}/{COMPLETE}", digest.encode())

    def on_node(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """`function(job, ...)` for a worker on any node: the paths in `job` exist there, and what it writes comes back."""
        return function if self.store is None else OnNode(self, function)

    def here(self) -> Workspace:
        """The same workspace on the node where this process runs."""
        assert self.store is not None
        folder = local_folder(self.store.url)
        try:
            node = (folder / _NODE).read_text(encoding="ascii")
        except FileNotFoundError:
            node = ""
        return Workspace(folder, self.store, node)

    def is_same_node(self, other: Workspace) -> bool:
        """Whether both are the copy of the same node, under whatever path."""
        return self._node == other._node

    def path_on(self, other: Workspace, path: Path) -> Path:
        """Translate a path of this node to the node of `other`. Paths that are neither inputs nor in the workspace stay."""
        for shared, name in () if self.is_same_node(other) else self._inputs.items():
            if path.is_relative_to(shared):
                return other.folder / name / path.relative_to(shared)
        return other.folder / path.relative_to(self.folder) if path.is_relative_to(self.folder) else path

    def _mirror(self, partial: Path, is_cut_off: Callable[[], bool] = lambda: False) -> Mirror:
        assert self.store is not None
        return Mirror(self.store, self._name(partial), partial, is_cut_off)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


class OnNode(Generic[Result]):
    """A function of a job, to be sent to a worker on another node.

    Before it runs there, the artifacts and inputs that the job names are fetched; what it writes to a folder with work in
    progress is mirrored to the store.

    Args:
        home: The workspace on the node that sends the function.
    """

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
    """A copy of `value` with every path changed, also inside of dataclasses, tuples, lists and dictionaries."""
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
    """The folders of artifacts and inputs in which the paths of a job lie. They are fetched or mirrored as a whole."""
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
