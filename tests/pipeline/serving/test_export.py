"""`kasa export` and `kasa import` as a person types them, on a tiny LLaMA."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlflow
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kasa import CheckpointWeights, KasaConfig, attach_saved, find_targets, read_adapter, save_adapter
from kasa.adapter_file import SavedAdapter
from kasa.checkpoint import weight_digest
from kasa.files import seal_folder
from kasa.spectra import bottom_triplets
from pipeline.cli.main import main
from pipeline.core.errors import ModelError
from pipeline.models import base as base_folder
from pipeline.models.prompting import Prompting
from pipeline.registry.store import ModelPackage, Registry
from pipeline.serving import logits, served_model
from pipeline.tracking.runs import Tracking

TOKENS = torch.arange(12)[None]

Kasa = Callable[..., tuple[int, str, str]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _save(folder: Path, base: Path, **changes: Any) -> SavedAdapter:
    config = KasaConfig(**{"rank": 3, "alpha": 6.0, "truncation": "weight", "dropped_rank": 3, **changes})
    generator, weights = torch.Generator().manual_seed(0), CheckpointWeights(base)
    targets = find_targets(AutoModelForCausalLM.from_pretrained(base), "all-linear")
    tensors, dropped, digests = {}, {}, {}
    for target in targets:
        weight = weights.weight(target)
        digests[target.name] = weight_digest(weight)
        shapes = {"a": (3, target.in_features), "d": (3,), "b": (target.out_features, 3)}
        tensors |= {f"{target.name}.{name}": torch.randn(s, generator=generator) / 8 for name, s in shapes.items()}
        left, right = bottom_triplets(weight, 3).dropped_factors(3)
        dropped |= {f"{target.name}.dropped_left": left, f"{target.name}.dropped_right": right}
    adapter = SavedAdapter(config, tuple(targets), str(base), digests, tensors, dropped)
    save_adapter(folder, adapter)
    Prompting(prompt_template="Q: {prompt}").save(folder)
    return adapter


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    _save(tmp_path / "adapter", base)
    return tmp_path / "adapter"


@pytest.fixture
def kasa(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`kasa("export", ...)`: exit code, stdout, stderr."""
    for name in ("MLFLOW_TRACKING_URI", "KASA_BASE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kasa", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return call


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def _load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _adapted(base: Path, adapter: Path) -> torch.Tensor:
    model = _load(base)
    attach_saved(model, read_adapter(adapter))
    return _logits(model)


def test_lora(kasa: Kasa, base: Path, adapter: Path, tmp_path: Path) -> None:
    code, out, _ = kasa("export", adapter, "my lora", "--format", "lora", "--pad-rank")
    assert code == 0
    first, _, command = out.strip().splitlines()
    assert first.startswith("my lora: lora, rank 8, float32, ")
    served = shlex.split(command)
    assert served == [
        "vllm", "serve", str(base), "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"my lora={Path('my lora').absolute()}"
    ]  # fmt: skip
    loaded = PeftModel.from_pretrained(_load(base), "my lora")
    torch.testing.assert_close(_logits(loaded), _adapted(base, adapter), rtol=0, atol=1e-5)
    assert Prompting.load(tmp_path / "my lora") == Prompting.load(adapter)


def test_lora_as_json(kasa: Kasa, base: Path, adapter: Path) -> None:
    code, out, _ = kasa("export", adapter, "lora", "--format", "lora", "--dtype", "bf16", "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["format"], result["rank"], result["dtypes"], result["base"]) == ("lora", 6, ["bfloat16"], str(base))
    assert result["size"] == sum(file.stat().st_size for file in Path("lora").iterdir())


def test_merged(kasa: Kasa, base: Path, adapter: Path) -> None:
    code, out, _ = kasa("export", adapter, "whole", "--format", "merged", "--dtype", "fp32", "--json")
    assert code == 0
    result = json.loads(out)
    assert 0 < result["logits"]["largest"] < 1e-5 * result["logits"]["largest_logit"]
    assert result["command"] == f"vllm serve {Path('whole').absolute()}"
    assert result["request"] is None  # a base without a tokenizer renders no chats
    torch.testing.assert_close(_logits(_load(Path("whole"))), _adapted(base, adapter), rtol=0, atol=1e-5)


def test_merged_says_what_rounding_costs(kasa: Kasa, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "_COARSE", 1e-6)
    code, out, _ = kasa("export", adapter, "whole", "--format", "merged")
    assert code == 0
    assert "whole: merged, bfloat16, " in out
    assert "largest logit difference from the adapter " in out
    assert "note: rounding the merged weights to bfloat16 changes what the model says; --dtype fp32 and" in out


def test_a_model_too_large_to_be_compared(kasa: Kasa, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "memory_gib", lambda: (1.0, 0.0))
    code, out, _ = kasa("export", adapter, "whole", "--format", "merged")
    assert code == 0
    assert "note: logits not compared: that takes" in out
    assert "largest logit difference" not in out


def test_peft_kasa_and_back(kasa: Kasa, base: Path, adapter: Path) -> None:
    code, out, _ = kasa("export", adapter, "peft", "--format", "peft-kasa")
    assert code == 0
    assert "PEFT recomputes the truncation" in out
    assert "the same beta and gamma pull much harder" in out
    assert "from peft import PeftModel" in out
    code, out, _ = kasa("import", "peft", "back", "--base", base)
    assert code == 0
    assert f'kasa generate {Path("back").absolute()} "..."' in out
    assert Prompting.load(Path("back")) == Prompting.load(adapter)
    ours, theirs = read_adapter(adapter), read_adapter(Path("back"))
    assert theirs.config == dataclasses.replace(ours.config, regulariser="paper")
    assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items())
    torch.testing.assert_close(_adapted(base, Path("back")), _adapted(base, adapter))


def test_an_import_without_prompting_takes_prompts_as_they_are(kasa: Kasa, base: Path, adapter: Path) -> None:
    kasa("export", adapter, "peft", "--format", "peft-kasa")
    Path("peft/prompting.json").unlink()
    code, out, _ = kasa("import", "peft", "back", "--base", base, "--json")
    assert code == 0
    assert "prompts go to the model as they are" in json.loads(out)["notes"][0]
    assert Prompting.load(Path("back")) == Prompting()


@pytest.fixture
def tracking(tmp_path: Path) -> Iterator[Tracking]:
    """A store of its own; what MLflow then remembers for the whole process is undone."""
    with patch.dict(os.environ):
        yield Tracking(tmp_path / "work", "tests")
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)


def test_a_registered_model(kasa: Kasa, tracking: Tracking, base: Path, adapter: Path, tmp_path: Path) -> None:
    settings = {
        "head": "language-model",
        "base_name": "gone",
        "base_folder": str(base),
        "precision": "fp32",
        "max_new_tokens": 1,
    }
    seal_folder(adapter)
    code = Path(served_model.__file__)
    run, registry = tracking.start_run("register", {}), Registry(Path("work"))
    package = ModelPackage(code, (), {"adapter": adapter}, settings, (), "A prompt.")
    # The second is a try again, after the answer to the first was lost.
    made = [registry.register(run, "tiny", package, {"kasa.register_key": "k"}).version for _ in range(2)]
    assert made == ["1", "1"]
    registry.client.set_registered_model_alias("tiny", "champion", "1")
    for uri in ("models:/tiny@champion", "models:/tiny/1"):
        out = uri.rpartition("/")[2]
        assert kasa("export", uri, out, "--format", "merged", "--dtype", "fp32", "-w", "work")[0] == 0
        torch.testing.assert_close(_logits(_load(Path(out))), _adapted(base, adapter), rtol=0, atol=1e-5)
        assert Prompting.load(Path(out)) == Prompting.load(adapter)
    champion = registry.champion("tiny")
    copy = registry.fetch_adapter(champion.uri, tmp_path / "champion")
    (copy / "prompting.json").write_text("{}")
    assert Prompting.load(registry.fetch_adapter(champion.uri, copy)) == Prompting.load(adapter)
    # One byte of what lies in the registry.
    (stored,) = (tmp_path / "work" / "mlartifacts").rglob("adapter/prompting.json")
    stored.write_text(stored.read_text().replace("t", "u", 1))
    registry.client.delete_registered_model_alias("tiny", "champion")
    for command in (["export", "models:/tiny/1", "more", "--format", "lora"], ["promote", "models:/tiny/1"]):
        status, _, said = kasa(*command, "-w", "work")
        assert (status, "prompting.json was changed" in " ".join(said.split())) == (2, True)
    (copy / "prompting.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"models:/tiny/1 is damaged in the registry: artifacts/adapter/prompting\.json"
    ):
        registry.fetch_adapter(champion.uri, copy)
    assert registry.champion("tiny") is None
    status, _, said = kasa("export", "models:/tiny/2", "more", "--format", "lora", "-w", "work")
    assert (status, "tiny has no version 2; the newest are 1" in said) == (2, True)


def test_a_base_elsewhere(kasa: Kasa, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = base.rename(base.with_name("moved"))
    code, _, said = kasa("export", adapter, "whole", "--format", "merged")
    assert (code, "neither a folder nor a hub id" in said) == (2, True)
    assert kasa("export", adapter, "one", "--format", "merged", "--base", moved)[0] == 0
    monkeypatch.setenv("KASA_BASE_MODEL", str(moved))
    assert kasa("export", adapter, "two", "--format", "merged")[0] == 0
    monkeypatch.delenv("KASA_BASE_MODEL")
    # A LoRA needs no base; it is then named as the adapter records it.
    code, out, _ = kasa("export", adapter, "lora", "--format", "lora")
    assert (code, f"vllm serve {base} " in out) == (0, True)


def test_a_base_from_the_hub_keeps_its_name(
    kasa: Kasa, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(adapter, dataclasses.replace(read_adapter(adapter), base="organisation/name"))
    monkeypatch.setattr(base_folder, "_from_hub", lambda settings, fetch: base)
    code, out, _ = kasa("export", adapter, "lora", "--format", "lora")
    assert (code, "vllm serve organisation/name " in out) == (0, True)
    code, out, _ = kasa("export", adapter, "other", "--format", "lora", "--base", base)
    assert (code, f"vllm serve {base} " in out) == (0, True)
    assert kasa("export", adapter, "whole", "--format", "merged", "--json")[0] == 0


def test_a_changed_base(kasa: Kasa, base: Path, adapter: Path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    for wanted in ("lora", "merged", "peft-kasa"):
        code, _, said = kasa("export", adapter, "out", "--format", wanted)
        assert (code, "is another weight" in said) == (2, True)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out", "--format", "lora"], "nowhere is neither a registry URI"),
        (["models:/x@champion", "out", "--format", "lora"], "workspace holds no MLflow database"),
        (["adapter", "base", "--format", "lora"], "base exists already; name another folder"),
        (["adapter", "base", "--format", "merged"], "base exists already; name another folder"),
        (["adapter", "out", "--format", "gguf"], "gguf"),
        (["adapter", "out"], "--format"),
        (["adapter", "out", "--format", "merged", "--pad-rank"], "--pad-rank belongs to --format lora"),
        (["adapter", "out", "--format", "peft-kasa", "--dtype", "bf16"], "leave out --dtype bf16"),
        (["adapter", "out", "--format", "lora", "--base", "nowhere"], "--base nowhere is no folder"),
        (["adapter", "out", "--format", "merged", "--base", "adapter"], "has no config.json"),
    ],
)
def test_mistakes(kasa: Kasa, adapter: Path, arguments: list[str], message: str) -> None:
    code, out, said = kasa("export", *arguments)
    assert code == 2
    assert message in " ".join(said.split())
    assert "Traceback" not in said + out
    assert not Path("out").exists()


def test_an_adapter_peft_cannot_say(kasa: Kasa, base: Path, tmp_path: Path) -> None:
    _save(tmp_path / "calibrated", base, truncation="activation")
    code, _, said = kasa("export", "calibrated", "out", "--format", "peft-kasa")
    assert (code, "use --format lora, which is exact" in said) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapter", "out", "--base", "base"], "adapter has no adapter_config.json; it is no PEFT adapter"),
        (["adapter", "adapter", "--base", "base"], "adapter exists already"),
        (["adapter", "out", "--base", "nowhere"], "--base nowhere is no folder"),
        (["adapter", "out"], "--base"),
    ],
)
def test_mistakes_in_an_import(kasa: Kasa, adapter: Path, arguments: list[str], message: str) -> None:
    code, _, said = kasa("import", *arguments)
    assert (code, message in " ".join(said.split())) == (2, True)
    assert not Path("out").exists()
