"""What KaSA is worth beside LoRA: every arm trained at its own best learning rate, then compared on rows it has not seen.

The rates are chosen on the first third of the held-out rows with a seed that the comparison does not use; the same three are
tried for all arms, and while an arm's best lies at an end of its grid, that grid grows. The comparison takes fresh seeds
and the other two thirds. Each training is a process of its own with one thread, and its result is kept in the workspace:
`python -m benchmarks.checks.method WORKSPACE TASK ARM RATE SEED`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.core import CannotRunError, Measurement, Setting, check
from benchmarks.training import (
    ALPHA,
    E2E,
    RANK,
    Arm,
    Task,
    mean_loss,
    minilm_reviews,
    row_losses,
    run_trainings,
    shuffled_reviews,
    smollm2_e2e,
    smollm2_long_reference,
    train_adapter,
)
from kasa import KasaConfig
from pipeline.core.files import atomic_write
from pipeline.metrics.intervals import difference_over_seeds, holm, mean_over_seeds
from pipeline.metrics.metric import SampleResult

TASKS: Mapping[str, Callable[[Path], Task]] = {
    "e2e": smollm2_e2e,
    "python-reference": smollm2_long_reference,
    "encoder-reviews": minilm_reviews,
}
ARMS: Mapping[str, Arm] = {
    "lora": Arm(),
    "kasa": Arm(KasaConfig(RANK, ALPHA)),
    # As in the paper and its authors' code.
    "kasa-published": Arm(KasaConfig(RANK, ALPHA, truncation="authors", singular_value_start="normal")),
    "lora-gradient": Arm(gradient_start=True),
    "pissa": Arm(lora={"init_lora_weights": "pissa"}),
}
RATES = (1e-3, 2.5e-3, 6e-3)
GROWTH = 2.5
TUNING_SEED, SEEDS = 0, (1, 2, 3)

# Arm -> rate -> mean loss on the validation rows.
Tuning = dict[str, dict[float, float]]


@check(bar=0.003, direction="at most", unit="nats")
def method(setting: Setting) -> Measurement:
    """Held-out loss of the default KaSA less LoRA's, each at its own best rate, the largest of three tasks."""
    tasks = _tasks(setting.workspace, ("lora", "kasa"))
    worst = max(one["arms"]["kasa"]["difference"]["estimate"] for one in tasks.values())
    return Measurement(worst, _details(tasks))


@check(bar=0.003, direction="at most", unit="nats")
def method_others(setting: Setting) -> Measurement:
    """Held-out loss of the default KaSA less that of the best arm of all, the largest of three tasks."""
    tasks = _tasks(setting.workspace, tuple(ARMS))
    worst = max(
        one["arms"]["kasa"]["loss"]["estimate"] - min(arm["loss"]["estimate"] for arm in one["arms"].values())
        for one in tasks.values()
    )
    return Measurement(worst, _details(tasks))


def _details(tasks: dict[str, Any]) -> dict[str, Any]:
    return {"seeds": len(SEEDS), "rank": RANK, "tasks": tasks}


def _tasks(workspace: Path, arms: Sequence[str]) -> dict[str, Any]:
    """Task -> the losses that chose the rates, the rates, and the arms compared at them."""
    if not E2E.is_dir():
        raise CannotRunError(f"{E2E} is absent")
    shuffled_reviews(workspace)  # what is fetched is fetched before the processes would do so at once
    tuning = {task: _tuned(workspace, task, arms) for task in TASKS}
    rates = {task: {arm: min(losses, key=losses.__getitem__) for arm, losses in tuning[task].items()} for task in TASKS}
    jobs = [(task, arm, rates[task][arm], seed) for task in TASKS for arm in arms for seed in SEEDS]
    found = dict(zip(jobs, _trained(workspace, jobs), strict=True))
    tasks = {}
    for task in TASKS:
        runs = {arm: [found[task, arm, rates[task][arm], seed] for seed in SEEDS] for arm in arms}
        tasks[task] = {"validation": tuning[task], "rates": rates[task], "arms": _compared(runs)}
    return tasks


def _tuned(workspace: Path, task: str, arms: Sequence[str]) -> Tuning:
    grids = {arm: list(RATES) for arm in arms}
    while True:
        jobs = [(task, arm, rate, TUNING_SEED) for arm, rates in grids.items() for rate in rates]
        tuning: Tuning = {arm: {} for arm in arms}
        for (_, arm, rate, _), result in zip(jobs, _trained(workspace, jobs), strict=True):
            tuning[arm][rate] = result["validation"]
        grown = {arm: _grown(rates, tuning[arm]) for arm, rates in grids.items()}
        if grown == grids:
            return tuning
        grids = grown


def _grown(rates: list[float], losses: Mapping[float, float]) -> list[float]:
    best = min(rates, key=losses.__getitem__)
    return [rates[0] / GROWTH] * (rates[0] == best) + rates + [rates[-1] * GROWTH] * (rates[-1] == best)


def _trained(workspace: Path, jobs: Sequence[tuple[str, str, float, int]]) -> list[dict[str, Any]]:
    """The result of each training; those of an earlier call are read."""
    files = [workspace / "method" / f"{'-'.join(map(str, job))}.json" for job in jobs]
    missing = [job for job, file in zip(jobs, files, strict=True) if not file.exists()]
    run_trainings("benchmarks.checks.method", [(workspace, *job) for job in missing])
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _compared(runs: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Each arm's loss on the test rows and on unlike text, with its paired difference to LoRA's."""
    results = {arm: [_samples(run["test"]) for run in of_arm] for arm, of_arm in runs.items()}
    against = {arm: difference_over_seeds(results[arm], results["lora"], "loss") for arm in runs if arm != "lora"}
    adjusted = holm({arm: difference.p_value for arm, difference in against.items()})
    compared: dict[str, Any] = {}
    for arm, of_arm in runs.items():
        compared[arm] = {"loss": asdict(mean_over_seeds(results[arm], "loss"))}
        if arm in against:
            difference = against[arm]
            compared[arm]["difference"] = asdict(difference.interval) | {
                "by_seed": difference.by_seed,
                "adjusted_p": adjusted[arm],
            }
        if of_arm[0]["unlike"]:
            unlike = [_samples(run["unlike"]) for run in of_arm]
            before = [_samples(of_arm[0]["unlike_before"])]
            compared[arm]["forgotten"] = asdict(difference_over_seeds(unlike, before, "loss").interval)
        compared[arm]["seconds"] = round(sum(run["seconds"] for run in of_arm) / len(of_arm), 1)
    return compared


def _samples(losses: Sequence[tuple[float, int]]) -> list[SampleResult]:
    return [{"sample": str(index), "loss_sum": total, "tokens": count} for index, (total, count) in enumerate(losses)]


def train_once(workspace: Path, task_name: str, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one arm; its losses on validation rows, test rows and unlike text."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = TASKS[task_name](workspace)
    third = len(task.heldout) // 3
    final = seed != TUNING_SEED
    before = row_losses(task, task.unlike) if final else []
    started = time.perf_counter()
    train_adapter(task, ARMS[arm], rate, seed)
    seconds = time.perf_counter() - started
    validation = mean_loss(row_losses(task, task.heldout[:third]))
    test = row_losses(task, task.heldout[third:]) if final else []
    print(f"{task_name} {arm} {rate:g} seed {seed}: {validation:.4f} ({seconds:.0f} s)", file=sys.stderr)
    return {
        "validation": validation,
        "test": test,
        "unlike_before": before,
        "unlike": row_losses(task, task.unlike) if final else [],
        "seconds": seconds,
    }


if __name__ == "__main__":
    folder, name, of_arm, at_rate, with_seed = sys.argv[1:]
    result = train_once(Path(folder), name, of_arm, float(at_rate), int(with_seed))
    out = Path(folder) / "method" / f"{name}-{of_arm}-{float(at_rate)}-{with_seed}.json"
    atomic_write(out, json.dumps(result))
    print("{}")
