"""`kasa retrain` as a scheduler calls it, through real commands: nothing new, new rows, two at once, crash, lost lock.

One scenario serves the check and the test; they differ in the base and in the size of the data.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kasa import read_adapter
from pipeline.core.journal import read_journal
from pipeline.storage.lease import Lease, acquire
from pipeline.storage.lease_stores import FileLeaseStore
from tests.support.processes import beneath, end_all, start_kasa, wait_for

PATIENCE_S = 600.0
NOOPS = 3

Json = dict[str, Any]


@dataclass
class Retraining:
    """A recipe in `folder/recipe.yaml`, its workspace in `folder/workspace`, and what was seen.

    Attributes:
        name: the recipe's.
        add_rows: adds a file of rows to the data that the recipe names.
        noop_seconds: wall time of whole commands that found nothing to do.
        flaws: what was not as it should be.
        ticks: what each command said at its end, in order.
    """

    folder: Path
    name: str
    add_rows: Callable[[], None]
    noop_seconds: list[float] = field(default_factory=list)
    flaws: list[str] = field(default_factory=list)
    ticks: list[Json] = field(default_factory=list)

    def run(self) -> None:
        """The whole scenario."""
        first = self._finish(self._start())
        self._expect(first["status"] == "retrained", f"the first tick was {first['status']}")
        self._expect(first["model"]["promoted"], "the first version did not become the champion")
        self.find_nothing(NOOPS)
        self.add_rows()
        self._lose_the_lock()
        last = self._crash_while_others_come()
        self.find_nothing(1)
        self._compare(first, last)
        self._plan_nothing()

    def find_nothing(self, times: int) -> None:
        """Ticks that have nothing to do."""
        for _ in range(times):
            started = time.monotonic()
            tick = self._finish(self._start())
            self.noop_seconds.append(time.monotonic() - started)
            self._expect(tick["status"] == "unchanged", f"without anything new a tick was {tick['status']}")

    def _lose_the_lock(self) -> None:
        """Someone else takes over in the middle of training: the command must end and register nothing."""
        process = self._start()
        wait_for(self._is_training, process, PATIENCE_S)
        store = FileLeaseStore(self.folder / "workspace" / "retrain" / "leases", self.name)
        store.write(None, store.read().version)
        ours = acquire(store)
        self._expect(isinstance(ours, Lease), "the lock could not be taken in the test's own name")
        _, said = process.communicate(timeout=PATIENCE_S)
        self._expect(process.returncode == 1, f"a command that had lost its lock ended with {process.returncode}")
        self._expect("taken over by process" in said, f"a command that had lost its lock said: {said[-300:]}")
        self._expect(len(self._versions()) == 1, "a command that had lost its lock registered a version")
        if isinstance(ours, Lease):
            ours.release()

    def _crash_while_others_come(self) -> Json:
        """The holder is killed: of those that come meanwhile one leaves, one retrains, and one finds that it was done."""
        holder = self._start()
        wait_for(lambda: self._is_held_by(holder), holder, PATIENCE_S)
        leaver = self._finish(self._start())
        self._expect(leaver["status"] == "held", f"beside a running one a tick was {leaver['status']}")
        named = f"process {holder.pid} on {socket.gethostname()}"
        self._expect(named in leaver["reason"], f"the holder is not named in: {leaver['reason']}")
        waiting = [self._start("--wait") for _ in range(2)]
        children = beneath(holder)
        holder.kill()
        holder.communicate()
        end_all(children)
        killed = time.monotonic()
        wait_for(lambda: any(self._is_held_by(one) for one in waiting), waiting[0], PATIENCE_S)
        self.ticks.append({"seconds from the crash to the next holder": time.monotonic() - killed})
        done = sorted((self._finish(one) for one in waiting), key=lambda tick: str(tick["status"]))
        statuses = [tick["status"] for tick in done]
        self._expect(statuses == ["retrained", "unchanged"], f"the two that waited were {statuses}")
        return done[0]

    def _compare(self, first: Json, last: Json) -> None:
        """The second training went on from the first, beside the same truncation, and passed the gate or not."""
        if "artifacts" not in last:
            self._expect(False, "new rows led to no run")
            return
        before, after = (read_adapter(self.folder / tick["artifacts"]["train"] / "adapter") for tick in (first, last))
        same = all(bool((before.dropped[name] == after.dropped[name]).all()) for name in before.dropped)
        self._expect(same and before.dropped.keys() == after.dropped.keys(), "new rows changed what is dropped")
        self._expect(last["stages"]["spectra"] == "reused", "spectra were computed anew")
        self._expect(last["artifacts"]["prepare"] != first["artifacts"]["prepare"], "the new rows were not prepared")
        versions = self._versions()
        self._expect(len(versions) == 2, f"there are {len(versions)} versions after two retrainings")
        newest = max(versions, key=lambda version: int(version.version))
        self._expect(
            newest.tags["kasa.start"] != "" and "/1" in newest.tags["kasa.start"], "it did not go on from version 1"
        )
        self._expect(bool(newest.tags.get("kasa.reason")), "the new version carries no verdict")

    def _plan_nothing(self) -> None:
        """`kasa run` would make nothing, though the champion that it would go on from may be another by now."""
        out, _ = start_kasa(["run", "recipe.yaml", "--dry-run", "--json"], self.folder).communicate(timeout=PATIENCE_S)
        made = [stage["name"] for stage in json.loads(out.splitlines()[-1])["stages"] if stage["action"] != "reuse"]
        self._expect(not made, f"`kasa run` after all this would make {', '.join(made)} anew")

    def _versions(self) -> list[Any]:
        from mlflow import MlflowClient

        uri = f"sqlite:///{self.folder / 'workspace' / 'mlflow.db'}"
        return list(MlflowClient(uri, uri).search_model_versions(f"name = '{self.name}'"))

    def _start(self, *options: str) -> subprocess.Popen[str]:
        return start_kasa(["retrain", "recipe.yaml", "--json", *options], self.folder)

    def _finish(self, process: subprocess.Popen[str]) -> Json:
        out, said = process.communicate(timeout=PATIENCE_S)
        if process.returncode:
            raise RuntimeError(f"`kasa retrain` ended with {process.returncode}: {said[-3000:]}")
        tick: Json = json.loads(out.splitlines()[-1])
        self.ticks.append({name: tick[name] for name in ("status", "reason")})
        return tick

    def _is_training(self) -> bool:
        journals = (self.folder / "workspace" / "artifacts" / "train").glob("*.partial/journal.jsonl")
        return any(record.get("step", 0) >= 1 for journal in journals for record in read_journal(journal))

    def _is_held_by(self, process: subprocess.Popen[str]) -> bool:
        content = FileLeaseStore(self.folder / "workspace" / "retrain" / "leases", self.name).read().content
        return content is not None and json.loads(content)["pid"] == process.pid

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.flaws.append(otherwise)
