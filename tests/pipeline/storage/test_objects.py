import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.core.errors import StorageError, WorkspaceError
from pipeline.storage.lease import Holder, Lease, ObjectLeaseStore, acquire
from pipeline.storage.objects import ObjectStore
from tests.support.s3_server import S3Server, serving
from tests.support.tracking_server import free_port


def test_objects_come_back_as_they_were_written(store: ObjectStore, tmp_path: Path) -> None:
    store.check()
    assert store.read("a/b.json") is None
    store.write("a/b.json", b"one")
    content, version = store.read("a/b.json") or (b"", "")
    assert content == b"one"
    assert store.versions("a") == {"b.json": version}
    assert store.versions("elsewhere") == {}
    time.sleep(0.01)  # a clock may be coarse
    store.write("a/b.json", b"two")
    assert store.versions("a")["b.json"] != version
    (tmp_path / "up").write_bytes(b"file")
    store.upload(tmp_path / "up", "a/c/d")
    store.copy("a/c/d", "e")
    store.download("e", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b"file"
    assert set(store.versions("a")) == {"b.json", "c/d"}
    store.delete("a/b.json")
    store.delete("a/b.json")
    assert set(store.versions("")) == {"a/c/d", "e"}
    with pytest.raises(FileNotFoundError):
        store.download("a/b.json", tmp_path / "gone")


def test_only_one_creates_and_only_one_replaces(store: ObjectStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda n: store.create("lock", f"{n}".encode()), range(8)))
    assert len([version for version in created if version]) == 1
    winner = next(n for n, version in enumerate(created) if version)
    content, version = store.read("lock") or (b"", "")
    assert (content, version) == (f"{winner}".encode(), created[winner])
    time.sleep(0.01)
    assert (newer := store.replace("lock", b"second", version))
    assert store.replace("lock", b"third", version) is None
    assert store.read("lock") == (b"second", newer)


def test_of_many_at_once_one_replaces_on_s3(s3: S3Server) -> None:
    store = ObjectStore(s3.new_bucket())
    version = store.create("lock", b"first") or ""
    with ThreadPoolExecutor(8) as pool:
        replaced = list(pool.map(lambda n: store.replace("lock", f"{n}".encode(), version), range(8)))
    assert len([one for one in replaced if one]) == 1


def test_a_store_goes_to_other_processes_as_its_address(store: ObjectStore) -> None:
    assert pickle.loads(pickle.dumps(store)).url == store.url
    assert len(pickle.dumps(store)) < 500


def test_a_lease_in_the_store(store: ObjectStore) -> None:
    records = ObjectLeaseStore(store, "leases/one")
    lease = acquire(records)
    assert isinstance(lease, Lease)
    second = acquire(records)
    assert isinstance(second, Holder)
    assert second.pid == os.getpid()
    time.sleep(0.01)
    lease.confirm()
    lease.release()
    third = acquire(records)
    assert isinstance(third, Lease)
    third.release()


def test_a_store_away_for_seconds_is_waited_for(s3: S3Server) -> None:
    store = ObjectStore(s3.new_bucket(), retry_s=60)
    store.write("a", b"1")
    s3.process.send_signal(signal.SIGSTOP)
    threading.Timer(2, lambda: s3.process.send_signal(signal.SIGCONT)).start()
    assert (store.read("a") or ())[0] == b"1"


def test_a_refused_connection_is_tried_again_until_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, s3: S3Server
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"s3://bucket: writing a failed: Could not connect .* AWS_ENDPOINT_URL"):
        ObjectStore("s3://bucket", retry_s=1.5).write("a", b"")
    assert time.monotonic() - started > 1


def test_a_server_that_comes_up_late_is_waited_for(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ObjectStore("s3://bucket", retry_s=60).read, "a")
        time.sleep(1.5)
        assert not asked.done()
        with serving(port):
            assert asked.result() is None


def check_fails(url: str) -> str:
    started = time.monotonic()
    with pytest.raises(WorkspaceError) as looking:
        ObjectStore(url).check(writing=False)
    with pytest.raises(WorkspaceError) as caught:
        ObjectStore(url).check()
    assert str(looking.value).rpartition("; ")[2] == str(caught.value).rpartition("; ")[2]
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_used_is_said_at_once(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    assert "create the bucket first" in check_fails("s3://no-such-bucket/x")
    assert "is on no known kind of storage (s4://); name a folder, or s3://BUCKET/FOLDER" in check_fails("s4://x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    assert "check the network, and AWS_ENDPOINT_URL" in check_fails("s3://bucket/x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in check_fails("s3://bucket/x")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    assert check_fails("gs://bucket/x").endswith("needs a package that is not installed: pip install gcsfs")
