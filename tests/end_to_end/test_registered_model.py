"""A version as a real run registers it: what it carries, what it answers in other processes, and how the aliases fare."""

from __future__ import annotations

import ast
import json
import re
import shutil
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel

from kasa.errors import AdapterFileError
from pipeline.config.settings import EvaluateSettings
from pipeline.core.errors import ModelError
from pipeline.evaluation.results import read_samples
from pipeline.models.loading import load_base
from pipeline.serving.logits import logits_of
from pipeline.serving.served_model import TextModel
from tests.support.commands import run_kasa
from tests.support.serving import Stranger, adapter_logits, apart, ask, load_as_stranger, served
from tests.support.tiny_run import Bench

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("workspace")]

PROMPTS = ["count 16 from 196", "count 3 from 7"]
SEQUENCES = [torch.arange(1, 40)[None], torch.arange(7, 20)[None]]


@pytest.fixture(scope="module")
def version(bench: Bench, first: dict[str, Any]) -> Any:
    return bench.mlflow("workspace").get_model_version("tiny", first["model"]["version"])


@pytest.fixture(scope="module")
def model(bench: Bench, version: Any) -> Path:
    """The folder of the registered model."""
    place = bench.mlflow("workspace").get_model_version_download_uri("tiny", version.version)
    return Path(place.removeprefix("file://"))


@pytest.fixture(scope="module")
def stranger(bench: Bench, version: Any, tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    uri, database = f"models:/tiny/{version.version}", bench.folder / "workspace" / "mlflow.db"
    return load_as_stranger(uri, PROMPTS, SEQUENCES, database, tmp_path_factory.mktemp("stranger"))


def test_it_says_where_it_comes_from(bench: Bench, first: dict[str, Any], version: Any) -> None:
    tags = version.tags
    for stage in ("prepare", "spectra", "audit", "train", "evaluate"):
        assert tags[f"kasa.{stage}_key"] == Path(first["artifacts"][stage]).name
        assert tags[f"kasa.{stage}_run"] == first["stage_runs"][stage]
    assert tags["kasa.parent_run"] == first["run_id"]
    assert version.run_id == first["stage_runs"]["register"]
    assert (tags["kasa.seed.train"], tags["kasa.seed.split"]) == ("0", "0")
    assert all(len(tags[f"kasa.{name}_digest"]) == 64 for name in ("base", "data"))
    assert json.loads(tags["kasa.gate"])["against"]["base"].keys() == set(EvaluateSettings(kind="text").measured)
    assert tags["kasa.reason"] == first["model"]["reason"]
    assert tags["kasa.reason"] in version.description
    assert "| loss |" in version.description


def test_it_carries_the_evaluation_and_an_example(model: Path, first: dict[str, Any]) -> None:
    metrics, decision = (
        json.loads((model / "artifacts" / "evaluation" / f"{name}.json").read_text())
        for name in ("metrics", "decision")
    )
    assert metrics["metrics"] == first["metrics"]
    assert metrics["differences"] == first["differences"]
    assert (decision["promote"], decision["reason"]) == (first["model"]["promoted"], first["model"]["reason"])
    for candidate in ("base", "adapted"):
        samples = read_samples(model / "artifacts" / "evaluation" / "samples" / f"{candidate}.parquet")
        assert len(samples) == metrics["heldout_rows"] == 8
    example = json.loads((model / "input_example.json").read_text())
    assert example["inputs"][0].startswith("count ")
    assert example["params"] == {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "stop": [""]}
    assert "type: string" in (model / "MLmodel").read_text() or '"type": "string"' in (model / "MLmodel").read_text()
    assert not [file for file in model.rglob("*") if file.suffix in (".pkl", ".pickle", ".pt", ".bin")]


def test_it_carries_the_adapter_as_a_plain_lora_too(bench: Bench, model: Path) -> None:
    base, lora = bench.folder / "base", model / "artifacts" / "lora"
    assert json.loads((lora / "adapter_config.json").read_text())["r"] == 8  # rank 4, and 4 dropped
    _, ours = adapter_logits(base, model / "artifacts" / "adapter", "fp32", SEQUENCES)
    by_peft = logits_of(PeftModel.from_pretrained(load_base(base, "fp32"), lora), SEQUENCES)
    assert apart(by_peft, ours) < 1e-5


def test_a_stranger_gets_the_adapters_logits_without_pickle_and_without_this_checkout(
    bench: Bench, first: dict[str, Any], stranger: Stranger
) -> None:
    adapter = bench.folder / first["artifacts"]["train"] / "adapter"
    plain, ours = adapter_logits(bench.folder / "base", adapter, "fp32", SEQUENCES)
    assert apart(stranger.logits, ours) < 1e-5
    assert apart(plain, ours) > 1e-3
    assert stranger.own
    assert not stranger.strange


def test_its_requirements_name_what_its_code_imports(model: Path, stranger: Stranger) -> None:
    named = {_plain(line.partition("==")[0]) for line in (model / "requirements.txt").read_text().splitlines()}
    imported = {
        name
        for file in stranger.own
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        for name in _imported(node)
    }
    missing = {
        name: distributions
        for name, distributions in packages_distributions().items()
        if name in imported - {"kasa", "pipeline"} and not named & set(map(_plain, distributions))
    }
    assert not missing, "add them to SERVING_PACKAGES in pipeline/run/promotion.py, or import them in functions"


def test_a_server_answers_what_kasa_generate_answers(
    bench: Bench, version: Any, stranger: Stranger, tmp_path: Path
) -> None:
    uri = f"models:/tiny/{version.version}"
    typed = run_kasa(bench.folder, "generate", uri, *PROMPTS)["answers"]
    with served(uri, bench.folder / "workspace" / "mlflow.db", tmp_path / "serve.log") as address:
        assert ask(address, PROMPTS) == typed == stranger.answers
    assert any(typed)


def test_another_base_is_refused(bench: Bench, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    config = yaml.safe_load((model / "MLmodel").read_text())["flavors"]["python_function"]["config"]
    context: Any = SimpleNamespace(model_config=config, artifacts={"adapter": str(model / "artifacts" / "adapter")})
    other = tmp_path / "other"
    shutil.copytree(bench.folder / "base", other)
    monkeypatch.setenv("KASA_BASE_MODEL", str(other))
    TextModel().load_context(context)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(ModelError, match="its adapted weights are the same, but"):
        TextModel().load_context(context)
    weights = load_base(other, "fp32")
    with torch.no_grad():
        weights.get_parameter("model.layers.0.self_attn.q_proj.weight")[0, 0] += 1
    weights.save_pretrained(other)
    with pytest.raises(AdapterFileError, match=r"model\.layers\.0\.self_attn\.q_proj in .* is another weight"):
        TextModel().load_context(context)
    monkeypatch.setenv("KASA_BASE_MODEL", str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"KASA_BASE_MODEL is .*nowhere, which is no model folder"):
        TextModel().load_context(context)
    monkeypatch.delenv("KASA_BASE_MODEL")
    context.model_config = config | {"base_folder": str(tmp_path / "moved")}
    with pytest.raises(ModelError, match=r"is not at .*moved .*; set KASA_BASE_MODEL"):
        TextModel().load_context(context)


def test_a_workspace_that_was_moved_registers_nothing_anew(bench: Bench, version: Any) -> None:
    shutil.copytree(bench.folder / "workspace", bench.folder / "moved")
    before = bench.mlflow("moved").search_model_versions("name = 'tiny'")
    again = bench.run("moved")
    assert set(again["stages"].values()) == {"reused"}
    assert again["model"]["version"] == str(version.version)
    assert len(bench.mlflow("moved").search_model_versions("name = 'tiny'")) == len(before)


def test_a_reused_run_leaves_the_aliases_to_people(bench: Bench, version: Any) -> None:
    client, key = bench.mlflow("workspace"), version.tags["kasa.register_key"]
    before = client.get_registered_model("tiny").aliases
    run_kasa(bench.folder, "promote", f"models:/tiny/{version.version}", "--reason", "a person's choice")
    client.delete_registered_model_alias("tiny", "champion")  # and another person's
    versions = client.search_model_versions("name = 'tiny'")
    newest = max(int(one.version) for one in versions if one.tags.get("kasa.register_key") == key)
    # Even if the workspace has forgotten that it registered this: the registry has not.
    shutil.rmtree(bench.folder / "workspace" / "artifacts" / "register" / key)
    again = bench.run("workspace")
    assert (again["stages"]["train"], again["stages"]["register"]) == ("reused", "computed")
    assert again["model"]["version"] == str(newest)
    assert "champion" not in client.get_registered_model("tiny").aliases
    assert len(client.search_model_versions("name = 'tiny'")) == len(versions)
    for alias, number in before.items():
        client.set_registered_model_alias("tiny", alias, number)


def _plain(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _imported(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [str(node.module).partition(".")[0]]
    return []
