"""One training killed again and again, at random moments: its adapter is that of an undisturbed run."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.training.zero import newest_step
from tests.support.processes import beneath, end_all, wait_for
from tests.support.tiny_run import PATIENCE_S, Bench, adapter_bytes, make_bench

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.xdist_group("faults")]

STEPS, CHECKPOINT_EVERY = 1500, 25
WORKER_KILLS, LATEST_KILL_S = 10, 25.0
# From SIGKILL of a worker to the first new step.
LONGEST_RECOVERY_S = 60.0
OVERRIDES = (
    f"train.max_steps={STEPS}", "train.epochs=100", f"train.checkpoint_every={CHECKPOINT_EVERY}",
    f"train.max_failures={WORKER_KILLS + 2}", "adapter.dropout=0.1",
)  # fmt: skip


def test_twelve_kills_change_no_bit_of_the_adapter(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    undisturbed = bench.run("undisturbed", *OVERRIDES)
    run = KilledRun(bench)
    run.kill_workers()
    run.kill_driver("driver", after=STEPS * 5 // 8)
    run.kill_driver("gcs_server", after=STEPS * 3 // 4)
    result = bench.finish(run.process)
    assert adapter_bytes(result, bench) == adapter_bytes(undisturbed, bench)
    history = bench.mlflow("killed").get_metric_history(result["stage_runs"]["train"], "loss")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))
    assert run.recoveries_s
    assert max(run.recoveries_s) < LONGEST_RECOVERY_S


class KilledRun:
    """A run in the workspace `killed`.

    Attributes:
        process: The command in force.
        recoveries_s: Seconds from the kill of a worker to the first new step, where no other kill came between.
    """

    def __init__(self, bench: Bench) -> None:
        self.process = self._start(bench)
        self.recoveries_s: list[float] = []
        self._bench = bench
        self._random = random.Random(0)

    def kill_workers(self) -> None:
        """Kill a worker at a random moment, ten times. Some of the kills fall into the start of the training."""
        for count in range(WORKER_KILLS):
            moment = time.monotonic() + self._random.uniform(0, LATEST_KILL_S)
            # However fast the machine, the first half of the steps sees all of these kills.
            step = (count + self._random.random()) * STEPS / (2 * WORKER_KILLS)

            def due(moment: float = moment, step: float = step) -> list[Any]:
                return self._workers() if time.monotonic() > moment or self._last_step() >= step else []

            victim = self._random.choice(wait_for(due, self.process, PATIENCE_S))
            before = self._journal_file()
            end_all([victim])
            killed = time.monotonic()
            # Half of the time the next kill does not wait for the recovery from this one.
            if self._random.random() < 0.5:
                self._wait_for_new_step(before)
                self.recoveries_s.append(time.monotonic() - killed)
            else:
                wait_for(lambda victim=victim: victim not in self._workers(), self.process, PATIENCE_S)  # type: ignore[misc]

    def kill_driver(self, who: str, after: int) -> None:
        """Kill the command itself or Ray's head once step `after` is done, then run the same command again."""
        wait_for(lambda: self._last_step() >= after, self.process, PATIENCE_S)
        left, before = beneath(self.process), self._journal_file()
        if who == "driver":
            self.process.kill()
        else:
            beneath(self.process, who)[0].kill()
        self.process.communicate()
        self.process = self._start(self._bench)
        self._wait_for_new_step(before)
        # What the dead command left must not disturb the new one.
        end_all(left)

    @staticmethod
    def _start(bench: Bench) -> subprocess.Popen[str]:
        return bench.start("killed", *OVERRIDES)

    def _workers(self) -> list[Any]:
        return beneath(self.process, "RayTrainWorker")

    def _work(self) -> Path | None:
        return next((self._bench.folder / "killed" / "artifacts" / "train").glob("*.partial"), None)

    def _last_step(self) -> int:
        return max((record.get("step", 0) for record in self._bench.journal("killed")), default=0)

    def _journal_file(self) -> int:
        """The inode of the journal, which changes when a worker takes the journal over."""
        work = self._work()
        journal = work / "journal.jsonl" if work else None
        return journal.stat().st_ino if journal and journal.exists() else 0

    def _wait_for_new_step(self, before: int) -> None:
        def is_seen() -> bool:
            work = self._work()
            return bool(
                work
                and self._journal_file() not in (0, before)
                and self._last_step() > newest_step(work / "checkpoints")
            )

        wait_for(is_seen, self.process, PATIENCE_S)
