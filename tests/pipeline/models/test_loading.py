"""The door through which bases are loaded: what it refuses, what it says, and how it chooses attention and padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kasa import KasaConfig, attach, attach_saved, capture_adapter, read_adapter, save_adapter
from kasa.errors import TargetError
from kasa.targets import check_rank, find_targets
from pipeline.core.errors import BaseModelError
from pipeline.models.base import BaseModel
from pipeline.models.forward import collate, label_losses, padding_token
from pipeline.models.loading import draw_outline, empty_base, load_base
from pipeline.models.prompting import Head, head_modules
from pipeline.models.shapes import position_count, read_config
from tests.support.encoders import write_encoder

CLASSES = Head("classification", ("bad", "good", "mixed"))
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
}  # fmt: skip
DECODER = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
UP = "model.layers.{}.mlp.up_proj.weight"


def write(folder: Path, kind: str = "Llama", model: str = "ForCausalLM", **changes: Any) -> Path:
    sizes = SIZES if kind in ("Bert", "Roberta", "Albert") else DECODER
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    torch.manual_seed(0)
    getattr(transformers, kind + model)(config).save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Any) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


def change_config(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def unfit(folder: Path, case: str) -> Path:
    """A base of two layers with something wrong."""
    kind, sizes = ("Qwen2Moe", MOE) if case == "an expert removed" else ("Llama", {})
    write(folder, kind, **sizes)
    weights: dict[str, Any] = {
        "no head": lambda tensors: tensors.pop("lm_head.weight"),
        "two weights removed": lambda tensors: [tensors.pop(UP.format(layer)) for layer in (0, 1)],
        "another shape": lambda tensors: tensors.update({UP.format(1): torch.zeros(4, 32)}),
        "an expert removed": lambda tensors: tensors.pop("model.layers.0.mlp.experts.0.down_proj.weight"),
    }
    settings: dict[str, dict[str, Any]] = {
        "fewer layers": {"num_hidden_layers": 1},
        "more layers": {"num_hidden_layers": 3},
        "another architecture": {"model_type": "gpt2"},
    }
    return change_weights(folder, weights[case]) if case in weights else change_config(folder, **settings[case])


UNFIT = {
    "no head": r"lacks lm_head\.weight",
    "fewer layers": r"holds what the model has no place for: model\.layers\.1\.input_layernorm\.weight.* and 5 more",
    "more layers": r"lacks model\.layers\.2",
    "two weights removed": r"lacks model\.layers\.0\.mlp\.up_proj\.weight, model\.layers\.1\.mlp\.up_proj\.weight",
    "another shape": r"in another shape model\.layers\.1\.mlp\.up_proj\.weight \(4 x 32, not 48 x 32\)",
    "another architecture": "lacks transformer",
    "an expert removed": r"in another shape model\.layers\.0\.mlp\.experts\.down_proj \(3 x",
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused_by_name(tmp_path: Path, case: str) -> None:
    folder = unfit(tmp_path / "base", case)
    for look in (
        lambda: load_base(folder, "fp32"),
        lambda: empty_base(folder, "language-model"),
        lambda: BaseModel("base", folder).targets("all-linear"),
    ):
        with pytest.raises(BaseModelError, match=UNFIT[case]):
            look()


@pytest.mark.parametrize("case", ["fewer layers", "more layers", "two weights removed", "another shape"])
def test_so_is_one_below_a_new_head(tmp_path: Path, case: str) -> None:
    folder = unfit(tmp_path / "base", case)
    for look in (lambda: load_base(folder, "fp32", CLASSES), lambda: empty_base(folder, "classification")):
        with pytest.raises(BaseModelError, match=r"model\.layers\.[012]"):
            look()


def test_what_is_rightly_passed_over(tmp_path: Path) -> None:
    """Tied heads, buffers of old checkpoints, and other heads."""
    tied = write(tmp_path / "tied", tie_word_embeddings=True)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
           "model.layers.0.self_attn.bias": torch.ones(1, 1, 64, 64), "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4)}  # fmt: skip
    change_weights(tied, lambda tensors: tensors.update(old))
    model = load_base(tied, "fp32")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for head in (Head(), CLASSES):
        assert empty_base(tied, head.kind).training is False
        load_base(tied, "fp32", head)


@pytest.mark.parametrize("damage", ["cut", "shard", "json", "code", "list"])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, damage: str) -> None:
    folder = write(tmp_path / "base")
    message = {"cut": "model.safetensors", "shard": "is missing", "json": "config.json", "code": "code of its own",
               "list": "config.json"}[damage]  # fmt: skip
    if damage == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    elif damage == "shard":
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif damage == "json":
        (folder / "config.json").write_text("{")
    elif damage == "list":
        change_config(folder, hidden_size="wide")
    else:
        (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
        change_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})
    for look in (lambda: load_base(folder, "fp32"), lambda: draw_outline(folder, "language-model")):
        with pytest.raises(Exception, match=message) as raised:
            look()
        assert type(raised.value).__name__ in ("BaseModelError", "SpectrumError")
        assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_attention_is_what_the_model_can_do(tmp_path: Path) -> None:
    """Gemma-2 caps its attention's scores, which scaled dot product attention cannot."""
    folder = write(tmp_path / "base", "Gemma2", head_dim=8, attn_logit_softcapping=0.1, initializer_range=0.5)
    model = load_base(folder, "fp32").eval()
    sample = {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5]}
    capped = label_losses(model, collate([sample]))
    uncapped = load_base(change_config(folder, attn_logit_softcapping=1e6), "fp32").eval()
    assert (capped - label_losses(uncapped, collate([sample]))).abs().max() > 1e-6
    assert "eager" in " ".join(BaseModel("base", folder).remarks)
    llama = write(tmp_path / "llama")
    assert load_base(llama, "fp32").config._attn_implementation == "sdpa"
    assert BaseModel("llama", llama).remarks == ()


@pytest.mark.parametrize(
    ("eos", "pad"),
    [([7, 5], 7), (None, 3), (4, 4)],  # of a tokenizer: its separator is its end
    ids=["list", "none", "one"],
)
def test_a_new_head_finds_a_padding_token(tmp_path: Path, eos: Any, pad: int) -> None:
    folder = write_encoder(tmp_path / "base", "llama")
    change_config(folder, eos_token_id=eos, pad_token_id=None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "[SEP]"}))
    assert padding_token(load_base(folder, "fp32", CLASSES)) == pad


@pytest.mark.parametrize("kind", ["Bert", "Albert", "Roberta"])
def test_a_masked_language_models_pooler_starts_anew_with_the_head(tmp_path: Path, kind: str) -> None:
    sizes = {"embedding_size": 16} if kind == "Albert" else {}
    folder = write(tmp_path / "mlm", kind, "ForMaskedLM", **sizes)
    pooler = f"{kind.lower()}.pooler"
    parts = [] if kind == "Roberta" else [pooler]
    first, again, other = (load_base(folder, "bf16", CLASSES, seed) for seed in (1, 1, 2))
    assert head_modules(first) == [*parts, "classifier"]
    for part in parts:
        weights = [dict(model.get_submodule(part).named_parameters()) for model in (first, again, other)]
        name = next(name for name in weights[0] if name.endswith("weight"))
        assert torch.equal(weights[0][name], weights[1][name])
        assert not torch.equal(weights[0][name], weights[2][name])
        assert weights[0][name].dtype == torch.float32
    assert first(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3)
    targets = BaseModel("base", folder, "classification").targets("all-linear")
    assert targets
    assert not [target.name for target in targets if target.name.startswith(pooler)]
    # A part of it alone is damage.
    if kind == "Bert":
        change_weights(folder, lambda tensors: tensors.update({f"{pooler}.dense.bias": torch.zeros(32)}))
        with pytest.raises(BaseModelError, match=r"lacks bert\.pooler\.dense\.weight"):
            load_base(folder, "fp32", CLASSES)


def test_modules_of_one_output_and_experts_in_one_parameter_are_left_out_with_a_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", "Qwen2Moe", **MOE)
    base = BaseModel("base", folder, outlines=tmp_path / "outlines")
    targets = base.targets("all-linear")
    assert "shared_expert.up_proj" in " ".join(target.name for target in targets)
    assert not [target.name for target in targets if target.name.endswith("shared_expert_gate")]
    check_rank(targets, 8, "adapter.rank")
    narrow, stacked = base.remarks
    assert "2 modules" in narrow
    assert "shared_expert_gate (1 x 32)" in narrow
    model = load_base(folder, "fp32")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert f"{experts / sum(p.numel() for p in model.parameters()):.0%} of the weights" in stacked
    assert "down_proj, gate_up_proj" in stacked
    assert BaseModel("base", folder, outlines=tmp_path / "outlines").remarks == (narrow, stacked)
    # Who names it is told that no rank fits.
    with pytest.raises(TargetError, match="1 x 32"):
        check_rank(find_targets(model, ["shared_expert_gate"]), 1, "adapter.rank")


@pytest.mark.parametrize(
    ("kind", "changes", "length", "drops"),
    [
        ("Roberta", {"max_position_embeddings": 130, "pad_token_id": 1}, 128, True),
        ("XLMRoberta", {"max_position_embeddings": 130, "pad_token_id": 1}, 128, True),
        ("MPNet", {"max_position_embeddings": 130, "pad_token_id": 1}, 128, True),
        ("Bert", {"max_position_embeddings": 130}, 130, True),
        ("Bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, 512, False),
        ("Llama", {"max_position_embeddings": 64}, 64, False),
        ("Bloom", {}, None, False),
    ],
)
def test_what_a_model_says_of_itself(
    tmp_path: Path, kind: str, changes: dict[str, Any], length: Any, drops: bool
) -> None:
    """The longest sequence, and whether it drops activations: by its own modules and settings, whatever its class."""
    sizes = {key: SIZES[key] for key in SIZES if kind not in ("Bloom",)}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    body = transformers.AutoModel.from_config(config)
    assert position_count(body) == length
    body.save_pretrained(tmp_path / "base")
    assert read_config(tmp_path / "base").model_type == config.model_type
    if kind != "Bloom":
        assert BaseModel("base", tmp_path / "base", "classification").drops is drops


def test_a_kasa_adapter_holds_the_new_pooler(tmp_path: Path) -> None:
    folder = write(tmp_path / "mlm", "Bert", "ForMaskedLM")
    model = load_base(folder, "fp32", CLASSES).eval()
    config = KasaConfig(rank=4, truncation="none", dropped_rank=0)
    targets = BaseModel("base", folder, "classification").targets("all-linear")
    attach(model, targets, config, trained_modules=head_modules(model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_adapter(tmp_path / "adapter", capture_adapter(model, config, folder))
    again = load_base(folder, "fp32", CLASSES, seed=5).eval()
    attach_saved(again, read_adapter(tmp_path / "adapter"))
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
