"""The paper's task families on a small model: LoRA and KaSA under each truncation rule, against the base and each other.

Three seeds on a reduced budget, through `kasa compare`. The bar: the KaSA with the best estimate is no worse than LoRA; its
interval is in the details, and being the best of five it is flattered by chance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.checks.demo import copy_sources
from benchmarks.core import ROOT, CannotRunError, Measurement, Setting, check
from benchmarks.processes import start_kasa

DATA = ROOT.parent / "shared" / "data"
KASA = ("kasa:loss", "kasa:activation", "kasa:weight", "kasa:authors", "kasa:none")
TASKS = ("ARC-Easy", "ARC-Challenge", "openbookqa")
SEEDS, PATIENCE_S = 3, 6 * 3600.0


@check(bar=0, direction="at least", unit="BLEU")
def e2e(setting: Setting) -> Measurement:
    """BLEU of the best KaSA on E2E less LoRA's: SmolLM2-135M, three seeds, 40 steps, references grouped."""
    return _compare(
        setting,
        "e2e-smollm2",
        {"train": [DATA / "e2e" / "valid.txt"], "heldout": [DATA / "e2e" / "test.txt"]},
        ["train.max_steps=40", "data.heldout_rows=100"],
    )


@check(bar=0, direction="at least", unit="points")
def commonsense(setting: Setting) -> Measurement:
    """Accuracy of the best KaSA on ARC and OpenBookQA less LoRA's: SmolLM2-135M, three seeds, 20 steps."""
    sources = {
        side: [DATA / "commonsense" / task / f"{name}.json" for task in TASKS]
        for side, name in (("train", "train"), ("heldout", "test"))
    }
    return _compare(setting, "commonsense-smollm2", sources, ["train.max_steps=20", "data.heldout_rows=600"], 100)


def _compare(
    setting: Setting, recipe: str, sources: dict[str, list[Path]], overrides: Sequence[str], scale: float = 1
) -> Measurement:
    for file in (file for files in sources.values() for file in files):
        if not file.exists():
            raise CannotRunError(f"{file} is absent")
    folder = setting.scratch / recipe
    copy_sources(setting.workspace, folder / "workspace")
    named = [f"data.{side}={json.dumps([str(file) for file in files])}" for side, files in sources.items()]
    process = start_kasa(
        [
            "compare", recipe, "--methods", ",".join(["lora", *KASA]), "--seeds", str(SEEDS), "--json",
            "train.precision=fp32", *named, *overrides,
        ],
        folder,
    )  # fmt: skip
    out, said = process.communicate(timeout=PATIENCE_S)
    if process.returncode:
        raise RuntimeError(f"`kasa compare` ended with {process.returncode}: {said[-3000:]}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    differences = {name: found["methods"][name]["difference"] for name in KASA}
    best = max(differences, key=lambda name: differences[name]["estimate"])
    details = {name: found[name] for name in ("conclusion", "limits", "methods")} | {"best": best}
    return Measurement(scale * differences[best]["estimate"], details)
