"""The quality of what comes out: the paper's task families, LoRA beside KaSA, and heads on a small encoder.

The comparisons run through `kasa compare` in the workspace: a check that was interrupted resumes after the trainings that it
finished, and one with more steps or seeds reuses data and spectra. Their bar: the KaSA with the best estimate is no worse than
LoRA. Its interval is in the details; as the best of several it is flattered by chance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.core import ROOT, CannotRunError, Measurement, Setting, check
from benchmarks.inputs import copy_sources, fetch
from benchmarks.timing import kasa_command
from pipeline.config.recipe import load_recipe
from pipeline.evaluation.results import read_samples
from pipeline.metrics.intervals import measure
from pipeline.run.stages.evaluate import RESULTS

DATA = ROOT.parent / "shared" / "data"
KASA = ("kasa:loss", "kasa:activation", "kasa:weight", "kasa:authors", "kasa:none")
TASKS = ("ARC-Easy", "ARC-Challenge", "openbookqa")
E2E = {"train": [DATA / "e2e" / "valid.txt"], "heldout": [DATA / "e2e" / "test.txt"]}
COMMONSENSE = {
    side: [DATA / "commonsense" / task / f"{name}.json" for task in TASKS]
    for side, name in (("train", "train"), ("heldout", "test"))
}
ENCODER = Path("recipes/encoder_reviews.yaml")
# Task -> its metric, and what is changed in the recipe for it.
LABELS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "classification": ("matthews", ()),
    "regression": (
        "pearson",
        (
            "name=encoder-ratings",
            "base.head=regression",
            "data.train=embedded:movie-review-ratings",
            "data.columns={}",
            "evaluate.metric=pearson",
        ),
    ),
}


@check(bar=0, direction="at least", unit="BLEU")
def e2e(setting: Setting) -> Measurement:
    """BLEU of the best KaSA on E2E less LoRA's: SmolLM2-135M, 30 steps of 8, three seeds, references grouped."""
    budget = ["train.max_steps=30", "train.batch_size=8", "data.heldout_rows=100"]
    return _compare(setting, "e2e-smollm2", E2E, KASA, 3, budget)


@check(bar=0, direction="at least", unit="BLEU")
def e2e_full(setting: Setting) -> Measurement:
    """BLEU of KaSA by activation, the best rule of `e2e`, less LoRA's: SmolLM2-135M, the whole recipe, one seed."""
    return _compare(setting, "e2e-smollm2", E2E, ["kasa:activation"], 1)


@check(bar=0, direction="at least", unit="points")
def commonsense(setting: Setting) -> Measurement:
    """Accuracy of KaSA on ARC and OpenBookQA less LoRA's: SmolLM2-135M, 16 steps of 8, three seeds."""
    budget = ["train.max_steps=16", "train.batch_size=8", "data.heldout_rows=200"]
    return _compare(setting, "commonsense-smollm2", COMMONSENSE, ["kasa:loss"], 3, budget, scale=100)


@check(bar=0, direction="more than", unit="correlation", judges="the smaller lower end of the two 95% intervals")
def glue(setting: Setting) -> Measurement:
    """Movie reviews on MiniLM with a new head, polarity by Matthews' and rating by Pearson's correlation: the smaller gain."""
    details = {task: _run_labels(setting, metric, overrides) for task, (metric, overrides) in LABELS.items()}
    gains = [found["gain"] for found in details.values()]
    return Measurement(min(gain["estimate"] for gain in gains), details, judged=min(gain["low"] for gain in gains))


def _compare(
    setting: Setting,
    recipe: str,
    sources: Mapping[str, list[Path]],
    kasa: Sequence[str],
    seeds: int,
    budget: Sequence[str] = (),
    scale: float = 1,
) -> Measurement:
    for file in (file for files in sources.values() for file in files):
        if not file.exists():
            raise CannotRunError(f"{file} is absent")
    named = [f"data.{side}={json.dumps([str(file) for file in files])}" for side, files in sources.items()]
    setting.workspace.mkdir(parents=True, exist_ok=True)
    found, _ = kasa_command(
        "compare", recipe, "--methods", ",".join(["lora", *kasa]), "--seeds", str(seeds),
        f"workspace={setting.workspace}", "train.precision=fp32", *named, *budget,
    )  # fmt: skip
    differences = {name: found["methods"][name]["difference"] for name in kasa}
    best = max(differences, key=lambda name: differences[name]["estimate"])
    details = {name: found[name] for name in ("conclusion", "limits", "methods")} | {"best": best}
    return Measurement(scale * differences[best]["estimate"], details)


def _run_labels(setting: Setting, metric: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Run the encoder's recipe in a workspace of its own; what was measured."""
    fetch(load_recipe(ROOT / ENCODER, list(overrides)), setting.workspace)
    workspace = setting.scratch / f"glue-{metric}"
    copy_sources(setting.workspace, workspace)
    result, _ = kasa_command("run", str(ENCODER), *overrides, f"workspace={workspace}")
    results = read_samples(Path(result["artifacts"]["evaluate"]) / RESULTS)
    interval = measure(results, [metric])[metric]
    return {
        "metric": metric,
        "base_with_untrained_head": result["metrics"]["base"][metric],
        "adapted": {"estimate": interval.estimate, "low": interval.low, "high": interval.high},
        "gain": result["differences"]["base"][metric],
        "all": result["metrics"]["adapted"],
        "heldout_rows": len(results),
        "seconds": result["seconds"],
    }
