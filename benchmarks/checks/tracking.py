"""A tracking server that is killed while a model is trained."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.checks.demo import copy_sources
from benchmarks.core import CannotRunError, Measurement, Setting, check
from kasa.errors import KasaError
from pipeline.config.recipe import parse_recipe
from pipeline.core.journal import read_journal
from pipeline.data.sources import resolve_sources
from pipeline.models.base import find_base
from pipeline.run.graph import STAGES
from tests.support.processes import start_kasa
from tests.support.tracking_server import TrackingServer, curve_faults, outage, tracking_server

STEPS, KILL_AFTER, OUTAGE_S, PATIENCE_S = 120, 10, 30.0, 1200.0
RECIPE = {
    "name": "outage",
    "base": {"model": "embedded:smollm2-135m-instruct"},
    "data": {"train": "embedded:movie-reviews", "max_tokens": 128, "train_rows": STEPS * 4, "heldout_rows": 8},
    "adapter": {"truncation": "weight"},
    "spectra": {"audit_tokens": 64},
    "train": {
        "workers": 2, "deepspeed": "cpu_zero2", "precision": "fp32", "max_steps": STEPS, "batch_size": 4,
        "micro_batch_size": 2,
    },
    "evaluate": {"max_new_tokens": 1, "samples_shown": 1},
}  # fmt: skip


@check(bar=0, direction="at most", unit="points missing or repeated")
def tracking_outage(setting: Setting) -> Measurement:
    """Curves of a SmolLM2 run whose MLflow server was killed for 30 s during training, against the training's journal."""
    recipe = parse_recipe(RECIPE, "tracking-outage")
    try:
        resolve_sources(recipe.data, setting.workspace)
        find_base(recipe.base, setting.workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None
    folder = setting.scratch / "tracking-outage"
    copy_sources(setting.workspace, folder / "workspace")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    with tracking_server(folder / "server") as server:
        return _measure(folder, server)


def _measure(folder: Path, server: TrackingServer) -> Measurement:
    from mlflow import MlflowClient

    def last_step() -> int:
        journals = (folder / "workspace" / "artifacts" / "train").glob("*.partial/journal.jsonl")
        return max((record.get("step", 0) for file in journals for record in read_journal(file)), default=0)

    killed: list[float] = []

    def is_over() -> bool:
        killed[:] = killed or [time.monotonic()]
        return time.monotonic() - killed[0] >= OUTAGE_S

    process = start_kasa(["run", "recipe.yaml", "--json"], folder, {"MLFLOW_TRACKING_URI": server.uri})
    died_at = outage(server, process, last_step, KILL_AFTER, is_over, PATIENCE_S)
    back_at, away_s = last_step(), time.monotonic() - killed[0]
    out, said = process.communicate(timeout=PATIENCE_S)
    if process.returncode:
        raise RuntimeError(f"`kasa run` ended with {process.returncode}: {said[-3000:]}")
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    journal = read_journal(folder / result["artifacts"]["train"] / "journal.jsonl")
    client = MlflowClient(server.uri, server.uri)
    faults = curve_faults(client, result["stage_runs"]["train"], journal)
    return Measurement(
        faults["missing"] + faults["repeated"],
        {
            "faults": faults,
            "steps": len(journal),
            "server_died_after_step": died_at,
            "server_back_at_step": back_at,
            "away_s": away_s,
        },
        flaws=_flaws(client, result, len(journal), faults, went_on=died_at < back_at),
    )


def _flaws(client: Any, result: dict[str, Any], steps: int, faults: dict[str, int], went_on: bool) -> tuple[str, ...]:
    experiment = client.get_run(result["run_id"]).info.experiment_id
    runs = len(client.search_runs([experiment]))
    found = {
        f"{steps} of {STEPS} steps were trained": steps != STEPS,
        "the training did not go on while the server was away, or ended before it came back": not went_on,
        f"{runs} runs in MLflow instead of {1 + len(STAGES)}": runs != 1 + len(STAGES),
        f"points with other values or in another order: {faults}": bool(faults["wrong"] or faults["out_of_order"]),
    }
    return tuple(flaw for flaw, is_so in found.items() if is_so)
