"""A tiny random LLaMA with its tokenizer, and prepared data for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kasa.files import file_digest
from pipeline.config.settings import DataSettings
from pipeline.data.prepare import prepare_dataset
from pipeline.data.sources import DataSources, SourceFile
from tests.support.tiny_inputs import write_tiny_inputs


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_inputs(folder)
    return folder / "base"


@pytest.fixture
def prepared(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """`prepared(rows, **data settings)`: the folder of a held-out split of exactly these rows."""

    def make(rows: list[dict[str, Any]], **settings: Any) -> Path:
        (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        # Training has one row of the same form, about something else.
        asked = next(iter(rows[0]))
        trained = json.dumps({**rows[0], asked: "unseen"})
        (tmp_path / "train.jsonl").write_text(f"{trained}\n", encoding="utf-8")
        paths = [tmp_path / f"{side}.jsonl" for side in ("train", "heldout")]
        files = [(SourceFile(path, file_digest(path)),) for path in paths]
        data = DataSettings(train=["train.jsonl"], max_tokens=128, **settings)
        prepare_dataset(data, DataSources(files[0], files[1], ()), base, 128, tmp_path / "prepared", lambda *_: None)
        return tmp_path / "prepared"

    return make
