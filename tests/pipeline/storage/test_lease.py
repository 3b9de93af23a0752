"""One at a time: the decision as a table, the store's two operations, and real processes that race, crash and sleep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.core.errors import LeaseLostError
from pipeline.storage.lease import (
    CLOCKS_APART_S,
    DURATION_S,
    FileLeaseStore,
    Holder,
    Lease,
    acquire,
    decide,
    pulse_of,
    this_machine,
)
from tests.support import ROOT

NOW = 1000.0
PATIENCE_S = 60.0


def held_until(expires: float, **changes: object) -> Holder:
    values = {"id": "a", "host": "h", "machine": "m", "pid": 1, "started": 1, "since": 0.0, "expires": expires}
    return Holder(**{**values, **changes})


@pytest.mark.parametrize(
    ("holder", "pulse", "verdict"),
    [
        (None, "unknown", "free"),
        (held_until(NOW + 60), "alive", "held"),
        (held_until(NOW + 60), "gone", "take over"),
        (held_until(NOW + 60), "unknown", "held"),
        (held_until(NOW - 1), "alive", "take over"),
        (held_until(NOW - 1), "gone", "take over"),
        (held_until(NOW - 1), "unknown", "held"),
        (held_until(NOW - CLOCKS_APART_S - 1), "unknown", "take over"),
        # No clock that agrees with this one can have written it.
        (held_until(NOW + DURATION_S + CLOCKS_APART_S + 1), "unknown", "take over"),
        (held_until(NOW + 10 * 365 * 86400), "unknown", "take over"),
        (held_until(NOW + 10 * 365 * 86400), "alive", "held"),
    ],
)
def test_who_may_take_a_lease(holder, pulse, verdict) -> None:
    assert decide(holder, pulse, NOW) == verdict


DAMAGED = {
    "text": {"expires": "tomorrow"}, "none": {"expires": None}, "infinite": {"expires": float("inf")},
    "no such year": {"since": 1e300, "expires": 1e300}, "pid": {"pid": "1"}, "process": {"pid": 2**70, "started": [1]},
    "host": {"host": 3}, "machine": {"machine": None}, "more": {"more": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"[1]",
        b"\xff",
        b"{}",
        b"null",
        *(json.dumps(asdict(held_until(NOW)) | one).encode() for one in DAMAGED.values()),
    ],
)
def test_a_damaged_record_is_taken_over(tmp_path: Path, content: bytes) -> None:
    store = FileLeaseStore(tmp_path, "lease")
    store.write(content, None)
    lease = acquire(store)
    assert isinstance(lease, Lease)
    lease.release()


def test_a_process_id_used_again_is_another_process() -> None:
    me = held_until(NOW, machine=this_machine(), pid=os.getpid())
    assert pulse_of(me) == "gone"
    assert pulse_of(held_until(NOW, machine="another boot", pid=os.getpid())) == "unknown"


@pytest.mark.processes
def test_a_zombie_is_gone(tmp_path: Path) -> None:
    process = _holding(tmp_path)
    (holder,) = [acquire(FileLeaseStore(tmp_path, "one"))]
    assert isinstance(holder, Holder)
    assert pulse_of(holder) == "alive"
    process.kill()
    _until(lambda: pulse_of(holder) == "gone")  # not waited for: it stays in the process table until then
    process.communicate()


def test_a_store_writes_only_what_nobody_has_changed(tmp_path: Path) -> None:
    ours, theirs = FileLeaseStore(tmp_path, "one"), FileLeaseStore(tmp_path, "one")
    assert ours.read() == (None, None)
    first = ours.write(b"1", None)
    assert theirs.write(b"2", None) is None
    assert theirs.read() == (b"1", first)
    second = theirs.write(b"2", first)
    assert ours.write(b"3", first) is None
    assert ours.read() == (b"2", second)
    assert ours.write(None, second)
    assert ours.read().content is None
    assert FileLeaseStore(tmp_path, "one.more").read() == (None, None)


def test_a_writer_that_slept_through_many_changes_changes_nothing(tmp_path: Path) -> None:
    store = FileLeaseStore(tmp_path, "one")
    old = version = store.write(b"0", None)
    for number in range(1, 100):
        version = store.write(str(number).encode(), version)
    assert len(list(tmp_path.iterdir())) < 50
    assert store.write(b"late", old) is None
    assert store.read() == (b"99", version)


def test_a_renewed_lease_outlives_its_duration_and_is_free_after_release(tmp_path: Path) -> None:
    store = FileLeaseStore(tmp_path, "one")
    lease = acquire(store, duration_s=0.5)
    assert isinstance(lease, Lease)
    time.sleep(1.2)
    holder = acquire(store)
    assert isinstance(holder, Holder)
    assert holder.id == lease.holder.id
    lease.confirm()
    lease.release()
    after = acquire(store)
    assert isinstance(after, Lease)
    after.release()


def test_whoever_lost_the_lease_hears_of_it_and_leaves_the_new_holder_alone(tmp_path: Path) -> None:
    store = FileLeaseStore(tmp_path, "one")
    lease = acquire(store)
    assert isinstance(lease, Lease)
    version = store.read().version
    other = held_until(time.time() + 60, pid=4321, host="elsewhere")
    assert store.write(json.dumps(asdict(other)).encode(), version)
    with pytest.raises(LeaseLostError, match="process 4321 on elsewhere"):
        lease.confirm()
    lease.release()
    assert json.loads(store.read().content or b"")["pid"] == 4321


@pytest.mark.processes
def test_of_processes_that_race_for_a_free_lease_one_gets_it(tmp_path: Path) -> None:
    for attempt in range(3):
        assert _race(tmp_path, attempt) == ["Holder"] * 3 + ["Lease"]


@pytest.mark.processes
def test_of_processes_that_race_for_a_crashed_holders_lease_one_gets_it(tmp_path: Path) -> None:
    crashed = _holding(tmp_path)
    assert isinstance(acquire(FileLeaseStore(tmp_path, "one")), Holder)
    crashed.kill()
    crashed.communicate()
    assert _race(tmp_path, 0) == ["Holder"] * 3 + ["Lease"]


@pytest.mark.processes
def test_a_holder_that_was_stopped_past_its_expiry_is_told_when_it_goes_on(tmp_path: Path) -> None:
    sleeper = _holding(tmp_path, duration_s=0.5)
    os.kill(sleeper.pid, signal.SIGSTOP)
    store, taken = FileLeaseStore(tmp_path, "one"), []

    def taken_over() -> bool:
        taken[:] = [acquire(store)]
        return isinstance(taken[0], Lease)

    _until(taken_over)
    os.kill(sleeper.pid, signal.SIGCONT)
    out, _ = sleeper.communicate("go on\n", timeout=PATIENCE_S)
    assert f"taken over by process {os.getpid()}" in out
    taken[0].confirm()
    taken[0].release()


# Each says when it is ready, tries when the file appears, and keeps what it got until all have tried.
RACE = """
import sys
from pathlib import Path
from pipeline.storage.lease import acquire
from pipeline.storage.lease import FileLeaseStore
store, go = FileLeaseStore(Path(sys.argv[1]), "one"), Path(sys.argv[2])
print("ready", flush=True)
while not go.exists():
    pass
got = acquire(store)
print(type(got).__name__, flush=True)
sys.stdin.readline()
if hasattr(got, "release"):
    got.release()
"""

HOLD = """
import sys
from pathlib import Path
from pipeline.core.errors import LeaseLostError
from pipeline.storage.lease import acquire
from pipeline.storage.lease import FileLeaseStore
lease = acquire(FileLeaseStore(Path(sys.argv[1]), "one"), duration_s=float(sys.argv[2]))
print("held", flush=True)
sys.stdin.readline()
try:
    lease.confirm()
except LeaseLostError as error:
    print(error, flush=True)
"""


def _python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def _race(folder: Path, attempt: int) -> list[str]:
    go = folder / f"go-{attempt}"
    racers = [_python(RACE, folder, go) for _ in range(4)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    go.touch()
    answers = [racer.stdout.readline().strip() for racer in racers if racer.stdout]
    for racer in racers:
        racer.communicate("done\n", timeout=PATIENCE_S)
    return sorted(answers)


def _holding(folder: Path, duration_s: float = 60.0) -> subprocess.Popen[str]:
    process = _python(HOLD, folder, duration_s)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def _until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
