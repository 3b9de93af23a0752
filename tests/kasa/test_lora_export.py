"""Exported LoRAs compute what the adapter does, when PEFT loads them on the untouched base."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from kasa import KasaConfig, export_lora, interchange
from kasa.adapter_file import SavedAdapter
from kasa.errors import InterchangeError
from kasa.lora_export import lora_rank, vllm_rank
from tests.kasa import tiny

CONFIG = KasaConfig(rank=4, alpha=6.0, truncation="loss", dropped_rank=3)


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return {"llama": tiny.save_llama, "gpt2": tiny.save_gpt2}[request.param](tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> SavedAdapter:
    return tiny.make_adapter(tiny.save_llama(tmp_path / "base"), CONFIG)


def _settings(out: Path) -> dict:
    return json.loads((out / "adapter_config.json").read_text())


@pytest.mark.parametrize(("truncation", "rank"), [("weight", 7), ("authors", 7), ("none", 4)])
def test_peft_computes_the_same(base: Path, tmp_path: Path, truncation, rank) -> None:
    adapter = tiny.make_adapter(base, dataclasses.replace(CONFIG, truncation=truncation))
    out = tmp_path / "lora"
    assert export_lora(adapter, out) == rank == lora_rank(adapter)
    loaded = PeftModel.from_pretrained(tiny.load(base), str(out))
    tiny.assert_same(tiny.logits(loaded), tiny.adapted_logits(base, adapter))
    assert (tiny.logits(tiny.load(base)) - tiny.adapted_logits(base, adapter)).abs().max() > 0.1


def test_layers_that_drop_different_amounts_share_one_rank(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base")
    adapter = tiny.make_adapter(base, dataclasses.replace(CONFIG, truncation="authors"))
    assert "model.layers.0.mlp.down_proj.dropped_left" not in adapter.dropped
    export_lora(adapter, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {7}
    assert {tensor.shape[1] for name, tensor in tensors.items() if "lora_B" in name} == {7}


def test_a_padded_rank_changes_nothing(adapter: SavedAdapter, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    assert export_lora(adapter, out, rank=vllm_rank(lora_rank(adapter))) == 8
    assert (_settings(out)["r"], _settings(out)["lora_alpha"]) == (8, 8)
    base = tmp_path / "base"
    loaded = PeftModel.from_pretrained(tiny.load(base), str(out))
    tiny.assert_same(tiny.logits(loaded), tiny.adapted_logits(base, adapter))


def test_only_the_adapted_modules_are_targets(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base")
    adapter = tiny.make_adapter(base, CONFIG, ["layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"])
    export_lora(adapter, tmp_path / "lora")
    assert _settings(tmp_path / "lora")["target_modules"] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    loaded = PeftModel.from_pretrained(tiny.load(base), str(tmp_path / "lora"))
    tiny.assert_same(tiny.logits(loaded), tiny.adapted_logits(base, adapter))


def test_what_the_folder_says(adapter: SavedAdapter, tmp_path: Path) -> None:
    beside = {"prompting.json": "{}"}
    export_lora(adapter, tmp_path / "one", base="organisation/name", dtype=torch.bfloat16, beside=beside)
    assert _settings(tmp_path / "one")["base_model_name_or_path"] == "organisation/name"
    assert {tensor.dtype for tensor in load_file(tmp_path / "one" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    assert (tmp_path / "one" / "prompting.json").read_text() == "{}"
    export_lora(adapter, tmp_path / "two")
    assert _settings(tmp_path / "two")["base_model_name_or_path"] == adapter.base
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "two").iterdir()}
    assert modes == {(tmp_path / "two").stat().st_mode & 0o666}


@pytest.mark.parametrize(("rank", "accepted"), [(1, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_ranks_vllm_accepts(rank: int, accepted: int) -> None:
    assert vllm_rank(rank) == accepted


def test_no_rank_of_vllm_is_large_enough() -> None:
    with pytest.raises(InterchangeError, match=r"rank 513, and vLLM serves at most 512; use --format merged"):
        vllm_rank(513)


def test_a_rank_too_small(adapter: SavedAdapter, tmp_path: Path) -> None:
    with pytest.raises(
        InterchangeError, match=r"rank 6 cannot hold the adapter; it needs 7: rank 4 for the update and 3"
    ):
        export_lora(adapter, tmp_path / "lora", rank=6)


def test_an_existing_folder_is_left_alone(adapter: SavedAdapter, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    with pytest.raises(InterchangeError, match=r"lora exists already; name another folder, or delete it"):
        export_lora(adapter, tmp_path / "lora")
    assert not list((tmp_path / "lora").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InterchangeError, match="link exists already"):
        export_lora(adapter, tmp_path / "link")


def test_a_place_where_no_folder_can_be(adapter: SavedAdapter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InterchangeError, match=r"file/lora cannot be made: Not a directory"):
        export_lora(adapter, tmp_path / "file" / "lora")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier.weight": torch.ones(2, 2)}, r"also trained classifier\.weight, which is no low-rank update"),
        ({"model.layers.0.mlp.up_proj.d": None}, r"lacks model\.layers\.0\.mlp\.up_proj\.d; it was not written whole"),
        ({"model.layers.0.mlp.up_proj.d": torch.full((4,), torch.nan)}, r"up_proj\.d holds NaN or Inf"),
    ],
)
def test_an_adapter_that_is_no_plain_update(adapter: SavedAdapter, tmp_path: Path, change, message) -> None:
    tensors = {name: tensor for name, tensor in {**adapter.tensors, **change}.items() if tensor is not None}
    with pytest.raises(InterchangeError, match=message):
        export_lora(dataclasses.replace(adapter, tensors=tensors), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_nothing_half_written(adapter: SavedAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(tensors, path, metadata) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(interchange, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_lora(adapter, tmp_path / "lora")
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]
