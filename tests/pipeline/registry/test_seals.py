"""Every file of a registered version is under a digest, which is compared wherever the version is put to use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kasa.errors import DamagedFileError
from kasa.files import seal_folder
from pipeline.core.errors import ModelError
from pipeline.registry.store import KEY_TAG, SEAL_TAG, ModelPackage, Registry
from pipeline.serving.served_model import TextModel
from pipeline.tracking.runs import Tracking
from tests.pipeline.registry.conftest import Kasa

CODE = """
import mlflow


class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str]) -> list[str]:
        return model_input


mlflow.models.set_model(Echo())
"""
CONTENTS = {"adapter/adapter.json": "{}", "lora/adapter_config.json": "{}", "evaluation/metrics.json": '{"loss": 0.25}'}


@pytest.fixture
def package(tmp_path: Path) -> ModelPackage:
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "lent").mkdir()
    (tmp_path / "lent" / "module.py").write_text("VALUE = 1\n")
    for name, text in CONTENTS.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    folders = {name.partition("/")[0]: tmp_path / name.partition("/")[0] for name in CONTENTS}
    return ModelPackage(
        tmp_path / "code.py", (tmp_path / "lent",), folders, {"base_digest": "abcdef"}, ["mlflow"], "A prompt."
    )


@pytest.fixture
def stored(registry: Registry, package: ModelPackage) -> Callable[[str], Path]:
    """Two versions, of which the first is the previous champion: the place of one of its files."""
    run = Tracking(Path("work"), "tests").start_run("register", {})
    for key in ("one", "two"):
        registry.register(run, "reviews", package, {KEY_TAG: key})
    registry.client.set_registered_model_alias("reviews", "champion", "2")
    registry.client.set_registered_model_alias("reviews", "previous", "1")
    place = registry.client.get_model_version_download_uri("reviews", "1")
    return lambda name: Path(place.removeprefix("file://")) / name


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


COMMANDS = [
    ("rollback", "reviews"),
    ("promote", "models:/reviews/1"),
    ("export", "models:/reviews/1", "out", "--format", "lora"),
    ("generate", "models:/reviews@previous", "hello"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_flipped_byte_is_named_wherever_a_version_is_put_to_use(
    kasa: Kasa, registry: Registry, stored: Callable[[str], Path], command: tuple[str, ...]
) -> None:
    flip(stored("artifacts/evaluation/metrics.json"))
    code, out, err = kasa(*command)
    said = " ".join(err.split())
    assert (code, out) == (2, "")
    assert "models:/reviews/1 is damaged in the registry: artifacts/evaluation/metrics.json was changed" in said
    assert "put that file back from a backup, register the adapter anew (`kasa run RECIPE --force register`)" in said
    assert registry.aliases("reviews") == {"champion": "2", "previous": "1"}


@pytest.mark.parametrize(
    "name",
    [*(f"artifacts/{name}" for name in CONTENTS), "MLmodel", "requirements.txt", "code/lent/module.py", "files.json"],
)
def test_every_file_of_a_version_counts(kasa: Kasa, stored: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    kept = tmp_path / "kept"
    shutil.copy(stored(name), kept)
    for damage in (flip, Path.unlink):
        damage(stored(name))
        code, _, err = kasa("promote", "models:/reviews/1")
        assert (code, Path(name).name in err) == (2, True), err
        shutil.copy(kept, stored(name))
    assert kasa("promote", "models:/reviews/1")[0] == 0
    assert kasa("rollback", "reviews")[0] == 0


def test_the_list_of_digests_is_under_one_too(kasa: Kasa, registry: Registry, stored: Callable[[str], Path]) -> None:
    flip(stored("artifacts/evaluation/metrics.json"))
    # A list that fits the damaged file.
    seal_folder(stored(""))
    code, _, err = kasa("promote", "models:/reviews/1")
    assert (code, "files.json was changed" in " ".join(err.split())) == (2, True)
    # What has no seal, as of before there were any, says so.
    registry.client.delete_model_version_tag("reviews", "1", SEAL_TAG)
    code, _, err = kasa("promote", "models:/reviews/1")
    assert (code, f"models:/reviews/1 has no tag {SEAL_TAG}: of its files only" in " ".join(err.split())) == (0, True)


def test_a_start_and_a_comparison_get_a_sound_adapter(
    registry: Registry, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = registry.fetch_adapter("models:/reviews/1", tmp_path / "champions" / "key")
    assert [file.name for file in copy.iterdir()] == ["adapter.json"]
    shutil.rmtree(copy)
    flip(stored("artifacts/adapter/adapter.json"))
    with pytest.raises(ModelError, match=r"reviews/1 is damaged in the registry: artifacts/adapter/adapter\.json"):
        registry.fetch_adapter("models:/reviews/1", copy)
    assert not copy.exists()


def test_a_served_version_compares_its_files(stored: Callable[[str], Path]) -> None:
    context: Any = SimpleNamespace(artifacts={"adapter": str(stored("artifacts/adapter"))}, model_config={})
    flip(stored("MLmodel"))
    with pytest.raises(DamagedFileError, match="MLmodel was changed"):
        TextModel().load_context(context)
    stored("files.json").unlink()
    with pytest.raises(DamagedFileError, match=r"files\.json, the list of the digests, is missing"):
        TextModel().load_context(context)


def test_what_was_stored_is_compared_with_what_was_handed_over(
    registry: Registry, package: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = registry._mlflow.artifacts.download_artifacts

    def damaged(**arguments: Any) -> str:
        files = real(**arguments)
        flip(Path(files) / "artifacts" / "lora" / "adapter_config.json")
        return str(files)

    monkeypatch.setattr(registry._mlflow.artifacts, "download_artifacts", damaged)
    run = Tracking(Path("work"), "tests").start_run("register", {})
    with pytest.raises(ModelError, match=r"stored something else: .*adapter_config\.json was changed"):
        registry.register(run, "reviews", package, {KEY_TAG: "one"})
    assert registry.versions("reviews") == []
