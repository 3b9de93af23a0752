"""The quickstart: what it gains, how long it takes, and how soon the same command again finds that there is nothing to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.core import ROOT, Measurement, Setting, check
from benchmarks.inputs import copy_sources, fetch
from benchmarks.timing import kasa_command
from pipeline.config.recipe import load_recipe
from pipeline.run.graph import STAGES
from pipeline.storage.mirror import MANIFEST

RECIPE = Path("recipes/quickstart.yaml")
# A short training is enough where only what comes after it is timed.
NIGHTLY = ("name=nightly", "data.heldout_rows=32", "data.train_rows=400", "train.max_steps=10")
NOOPS = 4
_METRICS = ("accuracy", "loss")


@check(bar=0, direction="more than", unit="points", judges="lower end of the 95% interval")
def demo_gain(setting: Setting) -> Measurement:
    """Held-out accuracy of the quickstart's adapter over its base."""
    _fetch_inputs(setting.workspace)
    result, _ = _run_quickstart(setting.workspace)
    return gain_of(result)


@check(bar=600, direction="at most", unit="s")
def demo_time(setting: Setting) -> Measurement:
    """The quickstart from an empty workspace, base and data already downloaded."""
    _fetch_inputs(setting.workspace)
    cold = setting.scratch / "quickstart"
    # What an earlier crash left would make this run a warm one.
    shutil.rmtree(cold, ignore_errors=True)
    copy_sources(setting.workspace, cold)
    result, seconds = _run_quickstart(cold)
    return Measurement(seconds, _times(result), flaws=unlike(result, "computed"))


@check(bar=15, direction="less than", unit="s")
def cache_noop(setting: Setting) -> Measurement:
    """The quickstart again right after: all stages reused."""
    _fetch_inputs(setting.workspace)
    _run_quickstart(setting.workspace)
    result, seconds = _run_quickstart(setting.workspace)
    return Measurement(seconds, _times(result), flaws=unlike(result, "reused"))


@check(bar=5, direction="less than", unit="s")
def retrain(setting: Setting) -> Measurement:
    """`kasa retrain` of SmolLM2 with nothing new, the whole command, the slowest of four."""
    _fetch_inputs(setting.workspace)
    command = ("retrain", str(RECIPE), f"workspace={setting.workspace}", *NIGHTLY)
    kasa_command(*command)
    ticks = [kasa_command(*command) for _ in range(NOOPS)]
    flaws = [f"a tick was {tick['status']}, not unchanged" for tick, _ in ticks if tick["status"] != "unchanged"]
    seconds = [took for _, took in ticks]
    return Measurement(max(seconds), {"seconds": seconds}, flaws=tuple(flaws))


def gain_of(result: dict[str, Any]) -> Measurement:
    """The gain in accuracy in points, judged by the lower end of its interval."""
    base, adapted = ({name: result["metrics"][who][name] for name in _METRICS} for who in ("base", "adapted"))
    against = result["differences"]["base"]
    accuracy = {name: 100 * value for name, value in against["accuracy"].items()}
    manifest = json.loads((Path(result["artifacts"]["evaluate"]) / MANIFEST).read_text(encoding="utf-8"))
    details = {
        "base": base,
        "adapted": adapted,
        "interval_points": [accuracy["low"], accuracy["high"]],
        "loss_difference": against["loss"],
        "heldout_rows": manifest["facts"]["rows"],
    }
    return Measurement(accuracy["estimate"], details, judged=accuracy["low"])


def unlike(result: dict[str, Any], status: str) -> tuple[str, ...]:
    """The stages that are missing or were not `status`, one line each."""
    found = {stage: result["stages"].get(stage, "missing") for stage in STAGES}
    return tuple(f"{stage} was {was}, not {status}" for stage, was in found.items() if was != status)


def _times(result: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each stage; `total` leaves out the start of Python. Prepare and spectra run side by side."""
    return {"stage_seconds": result["seconds"], "stages": result["stages"]}


def _fetch_inputs(workspace: Path) -> None:
    fetch(load_recipe(ROOT / RECIPE), workspace)


def _run_quickstart(workspace: Path) -> tuple[dict[str, Any], float]:
    return kasa_command("run", str(RECIPE), f"workspace={workspace}")
