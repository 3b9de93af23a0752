"""The quickstart: what it gains, how long it takes, and that a second run repeats nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.core import ROOT, CannotRunError, Measurement, Setting, check
from kasa import KasaError
from pipeline.config.recipe import load_recipe
from pipeline.data.sources import resolve_sources
from pipeline.models.base import find_base
from pipeline.run.graph import STAGES
from pipeline.storage.mirror import MANIFEST

RECIPE = Path("recipes/quickstart.yaml")
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
    result, seconds = _cold_run(setting)
    return Measurement(seconds, _times(result), flaws=unlike(result, "computed"))


@check(bar=15, direction="less than", unit="s")
def cache_noop(setting: Setting) -> Measurement:
    """The quickstart again right after: all stages reused."""
    _fetch_inputs(setting.workspace)
    _run_quickstart(setting.workspace)
    result, seconds = _run_quickstart(setting.workspace)
    return Measurement(seconds, _times(result), flaws=unlike(result, "reused"))


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
    """Per stage; `total` leaves out the start of Python. Prepare and spectra run side by side."""
    return {"stage_seconds": result["seconds"], "stages": result["stages"]}


def _cold_run(setting: Setting) -> tuple[dict[str, Any], float]:
    """One cold run serves all checks of a command: its result is kept in the scratch folder."""
    memo = setting.scratch / "quickstart.json"
    if not memo.exists():
        _fetch_inputs(setting.workspace)
        cold = setting.scratch / "quickstart"
        # What an earlier check's crash left would make this run a warm one.
        shutil.rmtree(cold, ignore_errors=True)
        copy_sources(setting.workspace, cold)
        memo.write_text(json.dumps(_run_quickstart(cold)), encoding="utf-8")
    result, seconds = json.loads(memo.read_text(encoding="utf-8"))
    return result, seconds


def copy_sources(workspace: Path, cold: Path) -> None:
    """Give a new workspace the downloads of another one, if there are any, and nothing else."""
    cold.mkdir(parents=True)
    if (workspace / "sources").is_dir():
        shutil.copytree(workspace / "sources", cold / "sources", ignore=shutil.ignore_patterns(".*"))


def _fetch_inputs(workspace: Path) -> None:
    """Download base and data, if need be, so that no figure depends on the network.

    Raises:
        CannotRunError: they cannot be had here.
    """
    recipe = load_recipe(ROOT / RECIPE)
    try:
        resolve_sources(recipe.data, workspace)
        find_base(recipe.base, workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None


def _run_quickstart(workspace: Path) -> tuple[dict[str, Any], float]:
    """The command's JSON and its seconds from start to exit, Python's own start included.

    Raises:
        RuntimeError: the command failed; what it said is on stderr.
    """
    command = [sys.executable, "-m", "pipeline.cli.main", "run", str(RECIPE), f"workspace={workspace}", "--json"]
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": python_path}, stdout=subprocess.PIPE, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"`kasa run {RECIPE}` ended with exit code {done.returncode}; its message is above")
    return json.loads(done.stdout.splitlines()[-1]), seconds
