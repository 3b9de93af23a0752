"""What goes along with a model version."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from kasa.errors import AdapterFileError
from pipeline.run.model_package import write_report
from pipeline.run.promotion import Decision
from pipeline.storage.artifacts import Artifact


def test_a_damaged_adapter_is_no_adapter_without_a_lora(recipe, tmp_path: Path) -> None:
    adapter = tmp_path / "train" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter.json").write_text("{}")
    (adapter / "tensors.safetensors").write_bytes(b"")
    made = {"train": Artifact("train", "k", adapter.parent, {}, reused=True)}
    evaluation = SimpleNamespace(
        samples={"adapted": [{"sample": 0}]}, metrics={}, intervals={}, differences={}, harness=[], champion_version=None,
        obstacle=None,
    )  # fmt: skip
    base = SimpleNamespace(name="base", folder=tmp_path)
    with pytest.raises(AdapterFileError, match=r"adapter\.json was changed"):
        write_report(tmp_path, recipe(), made, base, evaluation, Decision(True, "better"))  # type: ignore[arg-type]
