"""The paper's task families on a small model: LoRA and KaSA under each truncation rule, against the base and each other.

Through `kasa compare`, in the workspace: a check that was interrupted goes on from the trainings it finished, and so does one
that follows with more steps or seeds from the data and spectra. The bar: the KaSA with the best estimate is no worse than LoRA;
its interval is in the details, and being the best of several it is flattered by chance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.core import ROOT, CannotRunError, Measurement, Setting, check
from tests.support.processes import start_kasa

DATA = ROOT.parent / "shared" / "data"
KASA = ("kasa:loss", "kasa:activation", "kasa:weight", "kasa:authors", "kasa:none")
TASKS = ("ARC-Easy", "ARC-Challenge", "openbookqa")
E2E = {"train": [DATA / "e2e" / "valid.txt"], "heldout": [DATA / "e2e" / "test.txt"]}
COMMONSENSE = {
    side: [DATA / "commonsense" / task / f"{name}.json" for task in TASKS]
    for side, name in (("train", "train"), ("heldout", "test"))
}
PATIENCE_S = 24 * 3600.0


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
    process = start_kasa(
        [
            "compare", recipe, "--methods", ",".join(["lora", *kasa]), "--seeds", str(seeds), "--json",
            f"workspace={setting.workspace}", "train.precision=fp32", *named, *budget,
        ],
        setting.scratch,
    )  # fmt: skip
    out, said = process.communicate(timeout=PATIENCE_S)
    if process.returncode:
        raise RuntimeError(f"`kasa compare` ended with {process.returncode}: {said[-3000:]}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    differences = {name: found["methods"][name]["difference"] for name in kasa}
    best = max(differences, key=lambda name: differences[name]["estimate"])
    details = {name: found[name] for name in ("conclusion", "limits", "methods")} | {"best": best}
    return Measurement(scale * differences[best]["estimate"], details)
