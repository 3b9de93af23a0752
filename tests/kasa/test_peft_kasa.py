"""PEFT's KaSA folders, both ways: the same logits, and a clear refusal where PEFT would compute something else."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import KasaConfig as PeftKasaConfig
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from kasa import KasaConfig
from kasa.errors import InterchangeError
from kasa.peft_kasa import export_peft_kasa, import_peft_kasa
from tests.kasa import tiny

CONFIG = KasaConfig(
    rank=4,
    alpha=6.0,
    truncation="weight",
    dropped_rank=4,
    regulariser="paper",
    singular_value_weight=0.25,
    orthogonality_weight=0.5,
)
# PEFT's own SVD is fp32.
TOLERANCE = 1e-4


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.save_llama(tmp_path / "base")


def _peft_model(base: Path, **changes) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "kasa_config": PeftKasaConfig(0.25, 0.5)}
    model = get_peft_model(tiny.load(base), LoraConfig(**{**settings, **changes})).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return model


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    _peft_model(base).save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_trained_is_taken_over(base: Path, tmp_path: Path, rslora: bool) -> None:
    model = _peft_model(base, use_rslora=rslora, lora_dropout=0.1)
    model.save_pretrained(tmp_path / "peft")
    adapter = import_peft_kasa(tmp_path / "peft", base)
    tiny.assert_same(tiny.adapted_logits(base, adapter), tiny.logits(model), TOLERANCE)
    assert adapter.config == dataclasses.replace(CONFIG, alpha=12.0 if rslora else 6.0, dropout=0.1)
    assert len(adapter.targets) == 14
    assert adapter.base == str(base)


def test_peft_loads_what_is_exported(base: Path, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(base, CONFIG)
    export_peft_kasa(adapter, tmp_path / "out", base="organisation/name")
    loaded = PeftModel.from_pretrained(tiny.load(base), str(tmp_path / "out"))
    tiny.assert_same(tiny.logits(loaded), tiny.adapted_logits(base, adapter), TOLERANCE)
    settings = loaded.peft_config["default"]
    assert (settings.kasa_config.beta, settings.kasa_config.gamma) == (0.25, 0.5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "organisation/name"
    )


def test_there_and_back(base: Path, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(base, CONFIG)
    export_peft_kasa(adapter, tmp_path / "out")
    back = import_peft_kasa(tmp_path / "out", base)
    assert (back.config, back.weight_digests) == (adapter.config, adapter.weight_digests)
    assert sorted(back.targets, key=str) == sorted(adapter.targets, key=str)
    for ours, theirs in ((back.tensors, adapter.tensors), (back.dropped, adapter.dropped)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_authors_rule_fits_where_it_drops_as_much(base: Path, tmp_path: Path) -> None:
    authors = dataclasses.replace(CONFIG, truncation="authors")
    adapter = tiny.make_adapter(base, authors, ["q_proj", "gate_proj"])
    export_peft_kasa(adapter, tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny.load(base), str(tmp_path / "out"))
    tiny.assert_same(tiny.logits(loaded), tiny.adapted_logits(base, adapter), TOLERANCE)
    with pytest.raises(
        InterchangeError, match=r"this adapter drops 0 of model\.layers\.0\.self_attn\.k_proj; PEFT would"
    ):
        export_peft_kasa(tiny.make_adapter(base, authors), tmp_path / "more")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truncation": "none"}, r"drops the 4 smallest .* truncation 'none'; PEFT would .* use --format lora"),
        ({"truncation": "activation"}, r"truncation 'activation'"),
        ({"dropped_rank": 3}, r"as many triplets as the update has rank \(4\), and this adapter drops 3 of model"),
    ],
)
def test_what_peft_cannot_say(base: Path, tmp_path: Path, changes, message) -> None:
    adapter = tiny.make_adapter(base, dataclasses.replace(CONFIG, **changes))
    with pytest.raises(InterchangeError, match=message):
        export_peft_kasa(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_conv1d_is_refused(tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tiny.save_gpt2(tmp_path / "gpt2"), CONFIG)
    with pytest.raises(InterchangeError, match=r"c_attn is a Conv1D, on which PEFT refuses KaSA; use --format lora"):
        export_peft_kasa(adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kasa_config": None}, "is no KaSA adapter of PEFT's"),
        ({"peft_type": "IA3"}, "is no KaSA adapter of PEFT's"),
        ({"rank_pattern": {"q_proj": 2}}, "sets rank_pattern to .*; only plain KaSA can be imported"),
        ({"alpha_pattern": {"q_proj": 2}}, "sets alpha_pattern"),
        ({"bias": "all"}, "sets bias to 'all'"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"use_dora": True}, "sets use_dora"),
        ({"fan_in_fan_out": True}, "sets fan_in_fan_out"),
        ({"a_later_variant": {"x": 1}}, "sets a_later_variant"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights to 'pissa', which changes the base"),
        ({"r": "4"}, "r is '4'"),
        ({"r": 5}, "which is no adapter of rank 5"),
        ({"lora_alpha": None}, "is damaged: TypeError"),
        ({"kasa_config": {"beta": 1.0}}, "is damaged: KeyError 'gamma'"),
    ],
)
def test_a_folder_that_is_no_plain_kasa(folder: Path, base: Path, changes, message) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(InterchangeError, match=message):
        import_peft_kasa(folder, base)


def test_tensors_that_are_no_plain_kasa(folder: Path, base: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_diag"
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(2, 2)}, file)
    with pytest.raises(InterchangeError, match=r"holds base_model\.model\.lm_head\.weight, which is no part of KaSA"):
        import_peft_kasa(folder, base)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(InterchangeError, match=r"not complete: model\.layers\.0\.mlp\.up_proj\.d is missing"):
        import_peft_kasa(folder, base)
    save_file({}, file)
    with pytest.raises(InterchangeError, match="holds no tensors"):
        import_peft_kasa(folder, base)
    file.write_bytes(b"no tensors")
    with pytest.raises(InterchangeError, match="is damaged"):
        import_peft_kasa(folder, base)
    file.unlink()
    with pytest.raises(InterchangeError, match=r"adapter_model\.safetensors is missing$"):
        import_peft_kasa(folder, base)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InterchangeError, match="save it with safe_serialization=True"):
        import_peft_kasa(folder, base)


def test_no_configuration(tmp_path: Path, folder: Path, base: Path) -> None:
    with pytest.raises(InterchangeError, match=r"has no adapter_config\.json; it is no PEFT adapter"):
        import_peft_kasa(tmp_path / "nowhere", base)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InterchangeError, match=r"adapter_config\.json cannot be read"):
        import_peft_kasa(folder, base)


def test_another_base(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InterchangeError, match=r"does not fit the base: .* stores no weight"):
        import_peft_kasa(folder, tiny.save_gpt2(tmp_path / "gpt2"))
