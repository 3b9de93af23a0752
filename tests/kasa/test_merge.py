"""Merged folders: the adapter's logits, the base's other files, one rounding."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kasa import KasaConfig, merge
from kasa.adapter_file import SavedAdapter
from kasa.errors import InterchangeError, SpectrumError
from kasa.interchange import update_factors
from tests.kasa import tiny

CONFIG = KasaConfig(rank=4, alpha=6.0, truncation="loss", dropped_rank=3)
INDEX = "model.safetensors.index.json"


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def _change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.save_llama(tmp_path / "base")


@pytest.fixture
def adapter(base: Path) -> SavedAdapter:
    return tiny.make_adapter(base, CONFIG)


@pytest.mark.parametrize("truncation", ["weight", "authors", "none"])
@pytest.mark.parametrize("save", [tiny.save_llama, tiny.save_gpt2])
def test_merged_computes_what_the_adapter_does(tmp_path: Path, save, truncation) -> None:
    base = save(tmp_path / "base")
    adapter = tiny.make_adapter(base, dataclasses.replace(CONFIG, truncation=truncation))
    merged = merge(adapter, base, tmp_path / "merged")
    tiny.assert_same(tiny.logits(tiny.load(tmp_path / "merged")), tiny.adapted_logits(base, adapter))
    assert (merged.weights, merged.dtypes) == (len(adapter.targets), ("float32",))
    assert merged.parameters == sum(tensor.numel() for tensor in _state(base).values())


def test_a_sharded_base(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base", torch.bfloat16, max_shard_size="10KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    adapter = tiny.make_adapter(base, CONFIG)
    merged = merge(adapter, base, tmp_path / "merged", torch.float32)
    tiny.assert_same(tiny.logits(tiny.load(tmp_path / "merged")), tiny.adapted_logits(base, adapter))
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (base, tmp_path / "merged"))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == 2 * before["metadata"]["total_size"] == merged.size
    assert after["metadata"]["total_parameters"] == merged.parameters
    assert {f.name for f in (tmp_path / "merged").iterdir()} == {f.name for f in base.iterdir()}


def test_bf16_is_rounded_once_from_fp64(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base", torch.bfloat16)
    adapter = tiny.make_adapter(base, CONFIG)
    assert merge(adapter, base, tmp_path / "merged").dtypes == ("bfloat16",)
    before, after = _state(base), _state(tmp_path / "merged")
    for target in adapter.targets:
        left, right = update_factors(adapter, target)
        name = f"{target.name}.weight"
        assert torch.equal(after[name], (before[name].double() + left @ right).bfloat16())
    untouched = set(before) - {f"{target.name}.weight" for target in adapter.targets}
    assert all(torch.equal(after[name], before[name]) for name in untouched)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_another_type_is_also_the_configurations(tmp_path: Path, key: str) -> None:
    base = tiny.save_llama(tmp_path / "base", torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype")
    (base / "config.json").write_text(json.dumps({**config, key: "bfloat16", "text_config": {"dtype": "bfloat16"}}))
    adapter = tiny.make_adapter(tiny.save_llama(tmp_path / "same", torch.bfloat16), CONFIG)
    merge(adapter, base, tmp_path / "merged", torch.float32)
    after = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert after[key] == after["text_config"]["dtype"] == "float32"
    assert {"dtype", "torch_dtype"} & set(after) == {key}
    assert {tensor.dtype for tensor in _state(tmp_path / "merged").values()} == {torch.float32}


def test_all_but_other_weights_is_copied(base: Path, adapter: SavedAdapter, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "modeling_own.py"):
        (base / name).write_text(name)
    for name in ("pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json", INDEX):
        (base / name).write_text(name)
    save_file({"layers.0.wq.weight": torch.ones(2, 2)}, base / "consolidated.safetensors")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("x")
    (base / ".cache").mkdir()
    merge(adapter, base, tmp_path / "merged", beside={"prompting.json": "{}"})
    names = {file.relative_to(tmp_path / "merged").as_posix() for file in (tmp_path / "merged").rglob("*")}
    assert names == {
        "tokenizer.json", "chat_template.jinja", "LICENSE", "modeling_own.py", "config.json", "generation_config.json",
        "model.safetensors", "additional_chat_templates", "additional_chat_templates/rag.jinja", "prompting.json",
    }  # fmt: skip


def test_another_base(adapter: SavedAdapter, base: Path, tmp_path: Path) -> None:
    state = _state(base)
    state["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-6
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InterchangeError, match=r"trained on .*; model\.layers\.1\.mlp\.up_proj\.weight in .* is another"
    ):
        merge(adapter, base, tmp_path / "merged")
    with pytest.raises(SpectrumError, match=r"stores no weight model\.layers\.0"):
        merge(adapter, tiny.save_gpt2(tmp_path / "gpt2"), tmp_path / "merged")
    assert {entry.name for entry in tmp_path.iterdir()} == {"base", "gpt2"}


def test_a_value_too_large_for_its_type(base: Path, adapter: SavedAdapter, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.b"
    large = dataclasses.replace(adapter, tensors={**adapter.tensors, name: adapter.tensors[name] * 1e6})
    with pytest.raises(InterchangeError, match=r"up_proj\.weight overflows in float16; merge with --dtype fp32"):
        merge(large, base, tmp_path / "merged", torch.float16)
    assert not (tmp_path / "merged").exists()


def test_a_quantised_base(base: Path, adapter: SavedAdapter, tmp_path: Path) -> None:
    _change_config(base, quantization_config={"load_in_4bit": True})
    with pytest.raises(InterchangeError, match=r"is quantised.* use --format lora"):
        merge(adapter, base, tmp_path / "merged")


def test_a_base_that_is_not_whole(adapter: SavedAdapter, base: Path, tmp_path: Path) -> None:
    sharded = tiny.save_llama(tmp_path / "sharded", max_shard_size="10KB")
    index = json.loads((sharded / INDEX).read_text())
    (sharded / index["weight_map"]["lm_head.weight"]).unlink()
    with pytest.raises(InterchangeError, match=rf"is not complete: .*safetensors, named in {INDEX}, is missing"):
        merge(adapter, sharded, tmp_path / "merged")
    (sharded / INDEX).write_text("{")
    with pytest.raises(InterchangeError, match=rf"{INDEX} cannot be read"):
        merge(adapter, sharded, tmp_path / "merged")
    (sharded / INDEX).unlink()
    with pytest.raises(InterchangeError, match=r"holds neither model\.safetensors nor"):
        merge(adapter, sharded, tmp_path / "merged")
    (base / "config.json").write_text("[]")
    with pytest.raises(InterchangeError, match="holds no JSON object"):
        merge(adapter, base, tmp_path / "merged")
    (base / "config.json").unlink()
    with pytest.raises(InterchangeError, match=r"has no config\.json; it is no Hugging Face model folder"):
        merge(adapter, base, tmp_path / "merged")


def test_a_weight_that_only_an_unused_file_holds(adapter: SavedAdapter, base: Path, tmp_path: Path) -> None:
    state = _state(base)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: state.pop(name)}, base / "other.safetensors")
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpectrumError, match=rf"stores no weight {name}"):
        merge(adapter, base, tmp_path / "merged")
