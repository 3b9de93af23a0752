"""Tasks in the form of GLUE's on a small encoder: a class (judged by Matthews' correlation) and a value (by Pearson's)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.checks.demo import copy_sources
from benchmarks.core import ROOT, CannotRunError, Measurement, Setting, check
from kasa import KasaError, read_adapter
from pipeline.config.recipe import Recipe, load_recipe
from pipeline.data.prepared import load_prepared
from pipeline.data.sources import resolve_sources
from pipeline.evaluation.results import read_samples
from pipeline.metrics.intervals import measure
from pipeline.models.base import find_base
from pipeline.models.heads import Head
from pipeline.run.stages.evaluate import RESULTS
from pipeline.serving.inference import load_model

RECIPE = Path("recipes/encoder_reviews.yaml")
TASKS = {
    "classification": ("matthews", []),
    "regression": (
        "pearson",
        [
            "name=encoder-ratings",
            "base.head=regression",
            "data.train=embedded:movie-review-ratings",
            "data.columns={}",
            "evaluate.metric=pearson",
        ],
    ),
}
# Reloaded for a whole batch or sample by sample, fp32 sums differ in their last bits.
_RELOAD_TOLERANCE = 1e-3
_RELOADED_ROWS = 50


@check(bar=0, direction="more than", unit="correlation", judges="the smaller lower end of the two 95% intervals")
def glue(setting: Setting) -> Measurement:
    """Movie reviews on MiniLM with a new head, polarity by Matthews' and rating by Pearson's correlation: the smaller gain."""
    copied = setting.scratch / "glue"
    details: dict[str, Any] = {}
    flaws: list[str] = []
    for task, (metric, overrides) in TASKS.items():
        _fetch(load_recipe(ROOT / RECIPE, overrides), setting.workspace)
        if not copied.exists():
            copy_sources(setting.workspace, copied)
        recipe = load_recipe(ROOT / RECIPE, [*overrides, f"workspace={copied}"])
        details[task] = _run(recipe, metric, overrides, flaws)
    gains = [found["gain"] for found in details.values()]
    return Measurement(
        min(gain["estimate"] for gain in gains), details, judged=min(gain["low"] for gain in gains), flaws=tuple(flaws)
    )


def _run(recipe: Recipe, metric: str, overrides: list[str], flaws: list[str]) -> dict[str, Any]:
    """Run the recipe; what was measured, after the saved head has been loaded again and asked the held-out texts."""
    result = _command(["run", str(RECIPE), *overrides, f"workspace={recipe.location}", "--json"])
    folders = {stage: Path(folder) for stage, folder in result["artifacts"].items()}
    results = read_samples(folders["evaluate"] / RESULTS)
    interval = measure(results, [metric])[metric]
    flaws += _reloaded(recipe, folders, results)
    return {
        "metric": metric,
        "base_with_untrained_head": result["metrics"]["base"][metric],
        "adapted": {"estimate": interval.estimate, "low": interval.low, "high": interval.high},
        "gain": result["differences"]["base"][metric],
        "all": result["metrics"]["adapted"],
        "heldout_rows": len(results),
        "seconds": result["seconds"],
    }


def _reloaded(recipe: Recipe, folders: dict[str, Path], results: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the saved adapter: no head in it, or other answers than the evaluation had."""
    adapter = folders["train"] / "adapter"
    head, saved = Head.load(adapter), read_adapter(adapter)
    if not saved.trained_modules or not any(name.startswith(saved.trained_modules[0]) for name in saved.tensors):
        return [f"{recipe.name}: the adapter holds no head"]
    base = find_base(recipe.base, recipe.workspace)
    assert base is not None
    loaded = load_model(base.folder, adapter, recipe.train.precision, head)
    heldout = load_prepared(folders["prepare"]).heldout
    rows = range(min(_RELOADED_ROWS, len(heldout)))
    logits = loaded.outputs([heldout[row] for row in rows])
    evaluated = torch.tensor([results[row]["logits"] for row in rows])
    difference = float((logits - evaluated).abs().max())
    said = [str(one) for one in loaded.predictions([heldout[row]["prompt"] for row in rows])]
    flaws = []
    if difference > _RELOAD_TOLERANCE:
        flaws.append(f"{recipe.name}: reloaded, the head's outputs differ by {difference:.3g}")
    if head.kind == "classification" and said != [results[row]["output"] for row in rows]:
        flaws.append(f"{recipe.name}: asked by their text, samples have other classes than in the evaluation")
    return flaws


def _command(arguments: list[str]) -> dict[str, Any]:
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli.main", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"`kasa {' '.join(arguments)}` ended with exit code {done.returncode}; its message is above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _fetch(recipe: Recipe, workspace: Path) -> None:
    try:
        resolve_sources(recipe.data, workspace)
        find_base(recipe.base, workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None
