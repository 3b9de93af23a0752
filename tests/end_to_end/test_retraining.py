"""`kasa retrain` through real commands, as a scheduler calls it, and what a tick with nothing to do must not load."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from kasa import read_adapter
from pipeline.core.files import read_journal
from pipeline.storage.lease import FileLeaseStore, Lease, acquire
from tests.support import ROOT
from tests.support.commands import Json, finish, kill_with_descendants, run_kasa
from tests.support.processes import start_kasa, wait_for
from tests.support.tiny_run import make_bench

PATIENCE_S = 600.0
# A loaded machine may take its time; the benchmark `retrain` measures it.
LONGEST_NOOP_S = 30.0


@dataclass(frozen=True)
class Scheduled:
    """A recipe that retrains from `folder/rows`, called as often as anyone likes; its workspace is `folder/workspace`."""

    folder: Path
    name: str = "tiny"

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Start a tick."""
        return start_kasa(["retrain", "recipe.yaml", "--json", *options], self.folder)

    def tick(self) -> Json:
        """Run a tick to its end; what it said."""
        return finish(self.start(), PATIENCE_S)

    def leases(self) -> FileLeaseStore:
        """Where the lock of the ticks lies."""
        return FileLeaseStore(self.folder / "workspace" / "retrain" / "leases", self.name)

    def is_held_by(self, process: subprocess.Popen[str]) -> bool:
        """Whether a tick holds the lock."""
        content = self.leases().read().content
        return content is not None and json.loads(content)["pid"] == process.pid

    def is_training(self) -> bool:
        """Whether a training has done a step."""
        journals = (self.folder / "workspace" / "artifacts" / "train").glob("*.partial/journal.jsonl")
        return any(record.get("step", 0) >= 1 for journal in journals for record in read_journal(journal))

    def versions(self) -> list[Any]:
        """The registered versions, oldest first."""
        from mlflow import MlflowClient

        uri = f"sqlite:///{self.folder / 'workspace' / 'mlflow.db'}"
        found = MlflowClient(uri, uri).search_model_versions(f"name = '{self.name}'")
        return sorted(found, key=lambda version: int(version.version))


@pytest.fixture
def scheduled(tmp_path: Path) -> Scheduled:
    """The tiny run with its rows in a folder, warm-started from the champion."""
    folder = make_bench(tmp_path / "bench").folder
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"]["train"] = "rows"
    recipe["evaluate"]["metric"] = "loss"  # which six steps improve
    recipe["train"] |= {"start": "champion", "learning_rate": 0.01, "workers": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "rows").mkdir()
    (folder / "rows.jsonl").rename(folder / "rows" / "monday.jsonl")
    return Scheduled(folder)


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.xdist_group("faults")
def test_a_scheduler_may_call_it_as_it_likes(scheduled: Scheduled) -> None:
    first = scheduled.tick()
    assert first["status"] == "retrained"
    assert first["model"]["promoted"]
    for _ in range(3):
        assert_nothing_to_do(scheduled)
    rows = [{"prompt": f"count {n % 7} from {n}", "completion": f"{n} {n + n % 7} done"} for n in range(200, 260)]
    (scheduled.folder / "rows" / "tuesday.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_a_lost_lock_ends_the_command(scheduled)
    last = crash_while_others_come(scheduled)
    assert_nothing_to_do(scheduled)
    assert_warm_started(scheduled, first, last)
    # The champion that `kasa run` would start from may be another by now.
    planned = run_kasa(scheduled.folder, "run", "recipe.yaml", "--dry-run")["stages"]
    assert [stage["name"] for stage in planned if stage["action"] != "reuse"] == []


@pytest.mark.processes
def test_a_tick_with_nothing_to_do_loads_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, pipeline.cli.main, pipeline.apps.retrain; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "ray", "mlflow", "deepspeed", "datasets", "numpy", "scipy", "pandas", "pyarrow"}
    assert heavy & set(done.stdout.split()) == set()


def assert_nothing_to_do(scheduled: Scheduled) -> None:
    started = time.monotonic()
    assert scheduled.tick()["status"] == "unchanged"
    assert time.monotonic() - started < LONGEST_NOOP_S


def assert_a_lost_lock_ends_the_command(scheduled: Scheduled) -> None:
    """Someone else takes over in the middle of training: the command must end and register nothing."""
    process = scheduled.start()
    wait_for(scheduled.is_training, process, PATIENCE_S)
    store = scheduled.leases()
    store.write(None, store.read().version)
    ours = acquire(store)
    assert isinstance(ours, Lease)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "taken over by process" in said
    assert len(scheduled.versions()) == 1
    ours.release()


def crash_while_others_come(scheduled: Scheduled) -> Json:
    """The holder is killed: of those that come meanwhile one leaves, one retrains, and one finds that it was done.

    Returns:
        What the tick that retrained said.
    """
    holder = scheduled.start()
    wait_for(lambda: scheduled.is_held_by(holder), holder, PATIENCE_S)
    leaver = scheduled.tick()
    assert leaver["status"] == "held"
    assert f"process {holder.pid} on {socket.gethostname()}" in leaver["reason"]
    waiting = [scheduled.start("--wait") for _ in range(2)]
    kill_with_descendants(holder)
    wait_for(lambda: any(scheduled.is_held_by(one) for one in waiting), waiting[0], PATIENCE_S)
    done = sorted((finish(one, PATIENCE_S) for one in waiting), key=lambda tick: str(tick["status"]))
    assert [tick["status"] for tick in done] == ["retrained", "unchanged"]
    return done[0]


def assert_warm_started(scheduled: Scheduled, first: Json, last: Json) -> None:
    """The second training started from the first one's adapter, beside the same truncation, and met the gate."""
    before, after = (
        read_adapter(scheduled.folder / tick["artifacts"]["train"] / "adapter").dropped for tick in (first, last)
    )
    assert before.keys() == after.keys()
    assert all(bool((before[name] == after[name]).all()) for name in before)
    assert last["stages"]["spectra"] == "reused"
    assert last["artifacts"]["prepare"] != first["artifacts"]["prepare"]
    versions = scheduled.versions()
    assert len(versions) == 2
    assert "/1" in versions[-1].tags["kasa.start"]
    assert versions[-1].tags["kasa.reason"]
