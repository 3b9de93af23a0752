import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from pipeline.core.errors import DataError, LeaseLostError, WorkspaceError
from pipeline.core.files import is_remote, local_folder
from pipeline.data.sources import SourceFile
from pipeline.storage.objects import ObjectStore
from pipeline.storage.workspace import Workspace, open_workspace, replace_paths
from tests.support.s3_server import S3Server

Nodes = Callable[[str], Workspace]


@pytest.fixture
def at(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """One workspace as seen from the node of a name; the process then is on that node."""
    url = f"{s3.new_bucket()}/kasa"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")

    def see(node: str) -> Workspace:
        monkeypatch.setenv("KASA_CACHE", str(tmp_path / node))
        return open_workspace(url)

    return see


def make(workspace: Workspace, key: str = "k", text: str = "content") -> Path:
    """An artifact, made as the stages do it."""
    folder = workspace.folder / "artifacts" / "train" / key
    partial = folder.with_name(f"{key}.partial")
    partial.mkdir(parents=True)
    with workspace.leased(folder, print) as lease:
        with workspace.mirrored(partial, lease):
            (partial / "sub").mkdir()
            (partial / "sub" / "file").write_text(text)
        (partial / "manifest.json").write_text(f'{{"key": "{key}", "text": "{text}"}}')
        workspace.publish(partial, folder, lease)
        os.replace(partial, folder)
    return folder


def test_a_folder_is_that_folder_and_asks_nobody(tmp_path: Path) -> None:
    assert not is_remote(Path("workspace"))
    workspace = open_workspace(tmp_path)
    assert workspace.folder == local_folder(tmp_path) == tmp_path
    assert open_workspace(tmp_path.as_uri()).folder == tmp_path
    assert workspace.on_node(print) is print
    folder = make(workspace)
    workspace.fetch(folder)
    assert (folder / "sub" / "file").read_text() == "content"
    assert workspace.address(folder) == str(folder)


def test_an_artifact_made_on_one_node_is_the_same_on_another(at: Nodes) -> None:
    ours = at("ours")
    folder = make(ours)
    assert ours.address(folder).startswith("s3://kasa-")
    theirs = at("theirs")
    copy = theirs.folder / folder.relative_to(ours.folder)
    theirs.fetch(copy)
    assert (copy / "sub" / "file").read_text() == "content"
    assert not copy.with_name("k.partial").exists()
    # Made anew elsewhere: the copy here is no longer it. Removed: neither is.
    theirs.remove(copy)
    ours.fetch(folder)
    assert not folder.exists()
    make(ours, text="new content")
    theirs.fetch(copy)
    assert (copy / "sub" / "file").read_text() == "new content"


def test_without_its_manifest_nothing_is_complete(at: Nodes) -> None:
    ours = at("ours")
    partial = ours.folder / "artifacts" / "train" / "k.partial"
    partial.mkdir(parents=True)
    with ours.mirrored(partial, None):
        (partial / "journal.jsonl").write_text("one\n")
    theirs = at("theirs")
    folder = theirs.folder / "artifacts" / "train" / "k"
    theirs.fetch(folder)
    assert not folder.exists()
    with theirs.mirrored(folder.with_name("k.partial"), None):
        assert (folder.with_name("k.partial") / "journal.jsonl").read_text() == "one\n"


def test_a_lease_that_was_lost_publishes_nothing(at: Nodes) -> None:
    ours = at("ours")
    folder = ours.folder / "artifacts" / "train" / "k"
    partial = folder.with_name("k.partial")
    partial.mkdir(parents=True)
    (partial / "manifest.json").write_text("{}")
    with ours.leased(folder, print) as lease:
        records = ours.lease_store("leases/train/k")
        assert records is not None
        records.write(b"somebody else", records.read().version)
        with pytest.raises(LeaseLostError):
            ours.publish(partial, folder, lease)
    ours.fetch(folder)
    assert not folder.exists()


def test_a_dead_process_of_this_machine_holds_no_lease(at: Nodes) -> None:
    ours = at("ours")
    folder = ours.folder / "artifacts" / "train" / "k"
    holds = f"""
import os
from pathlib import Path
from pipeline.storage.workspace import open_workspace
with open_workspace({ours.address(ours.folder).removesuffix("/.")!r}).leased(Path({str(folder)!r}), print):
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", holds], check=True, env={**os.environ})
    waited: list[str] = []
    with ours.leased(folder, waited.append):
        assert not waited


def test_small_files(at: Nodes) -> None:
    ours = at("ours")
    file = ours.folder / "runs" / "a.json"
    file.parent.mkdir()
    file.write_text("{}")
    ours.save(file)
    theirs = at("theirs")
    copy = theirs.folder / "runs" / "a.json"
    theirs.load(copy)
    assert copy.read_text() == "{}"
    theirs.discard(copy)
    assert not copy.exists()
    ours.load(file)
    assert not file.exists()


@dataclasses.dataclass(frozen=True)
class Job:
    prepared: Path
    base: Path
    data: tuple[Path, ...]
    out: Path
    word: str = ""


def read_and_write(job: Job, more: str) -> str:
    (job.out / "result.jsonl").write_text(more)
    return "|".join(
        [
            (job.prepared / "sub" / "file").read_text(),
            (job.base / "config").read_text(),
            *(p.read_text() for p in job.data),
        ]
    )


def test_a_worker_elsewhere_finds_what_its_job_names(
    at: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "some:where")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config").write_text("base")
    (tmp_path / "rows.txt").write_text("rows")
    home = at("home")
    prepared = make(home)
    out = prepared.with_name("other.partial")
    out.mkdir()
    home.upload_input(tmp_path / "base", "1" * 64, lambda: None)
    home.upload_input(tmp_path / "rows.txt", "2" * 64, lambda: None)
    job = Job(prepared, tmp_path / "base", (tmp_path / "rows.txt",), out)
    assert home.on_node(read_and_write)(job, "here") == "content|base|rows"
    assert (out / "result.jsonl").read_text() == "here"

    with home.mirrored(out, None):
        sent = pickle.dumps(home.on_node(read_and_write))
        # There is nothing of this on the other node's disk.
        (tmp_path / "base").rename(tmp_path / "moved")
        (tmp_path / "rows.txt").unlink()
        monkeypatch.setenv("KASA_CACHE", str(tmp_path / "worker"))
        assert pickle.loads(sent)(job, "from afar") == "content|base|rows"
        home.catch_up()
    assert (out / "result.jsonl").read_text() == "from afar"


def test_an_input_that_changed_while_it_was_uploaded_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "some:where")
    store = ObjectStore(f"memory://{uuid4().hex}", retry_s=5)
    home, rows = Workspace(tmp_path / "home", store, "node"), tmp_path / "rows.txt"
    rows.write_text("others")
    file = SourceFile(rows, hashlib.sha256(b"rows").hexdigest())
    with pytest.raises(DataError, match=r"rows\.txt was changed while the run read it"):
        home.upload_input(rows, file.sha256, file.check_unchanged)
    assert list(store.versions("inputs")) == [f"{file.sha256[:32]}/rows.txt"]
    rows.write_text("rows")
    home.upload_input(rows, file.sha256, file.check_unchanged)
    assert (store.read(f"inputs/{file.sha256[:32]}/rows.txt") or ())[0] == b"rows"
    assert store.read(f"inputs/{file.sha256[:32]}/.complete")


def test_paths_are_found_wherever_they_are(tmp_path: Path) -> None:
    job = Job(Path("a"), Path("b"), (Path("c"), Path("d")), Path("e"), "f")
    changed = replace_paths({"job": [job]}, lambda path: tmp_path / path)
    assert changed["job"][0] == Job(
        tmp_path / "a", tmp_path / "b", (tmp_path / "c", tmp_path / "d"), tmp_path / "e", "f"
    )
    assert replace_paths(job, lambda path: path) is job


@pytest.mark.parametrize("server", [None, "sqlite:///mlflow.db", "mlruns"])
def test_mlflow_needs_a_server(server: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    with pytest.raises(WorkspaceError, match="start an MLflow server and name it with MLFLOW_TRACKING_URI"):
        open_workspace("s3://bucket/x")
