"""A base that cannot be found is blamed on what was perhaps meant."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from pipeline.config.settings import BaseSettings
from pipeline.core.errors import BaseModelError
from pipeline.models.base import find_base


def test_a_mistyped_folder_is_no_error_of_the_hub_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    Path("models/tiny").mkdir(parents=True)
    said = r"models/tny is no folder here; did you mean models/tiny\? and as a hub id it cannot be fetched"
    with pytest.raises(BaseModelError, match=said):
        find_base(BaseSettings(model="models/tny"), tmp_path)
    with pytest.raises(BaseModelError, match=r"organisation/name is no folder here; and as a hub id"):
        find_base(BaseSettings(model="organisation/name"), tmp_path)
