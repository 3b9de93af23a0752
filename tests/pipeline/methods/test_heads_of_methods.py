"""Other methods than KaSA beside a new head: what is saved is all that was trained, and PEFT reads it as well."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
)

from kasa import ModelWeights, find_targets, observe_layers
from kasa.spectra_file import save_spectra
from kasa.targets import is_within, outline_of
from pipeline.config.recipe import parse_recipe
from pipeline.methods.choice import method_of
from pipeline.methods.method import Method
from pipeline.methods.peft import _feedforward_names, norm_names
from pipeline.models.base import BaseModel
from pipeline.models.loading import load_base
from pipeline.models.prompting import Head, head_modules
from pipeline.serving.inference import load_model
from pipeline.spectra.decomposition import leading_triplets
from tests.support.encoders import write_encoder

HEAD = Head("classification", ("bad", "good"))
RANK = 4
METHODS = ["lora", "dora", "adalora", "vera", "fourierft", "ia3", "layernorm", "pissa", "corda", "full"]
BATCH = {"input_ids": torch.arange(5, 21).reshape(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}


@pytest.fixture(scope="module", params=["roberta", "deberta-v2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), request.param)


def build(name: str, base: Path, model: nn.Module, folder: Path) -> Method:
    targets = find_targets(model, "all-linear", head_modules(model))
    spectra = None
    if name == "corda":
        with observe_layers(model, targets) as sums, torch.no_grad():
            model(**BATCH)
        weights = ModelWeights(model)
        found = {t.name: leading_triplets(weights.weight(t), RANK, t.name, sums.weighting(t.name)) for t in targets}
        spectra = folder / "spectra"
        save_spectra(spectra, found, dict.fromkeys(found, "0"))
    adapter = {"method": name, "rank": RANK, "alpha": 2.0 * RANK}
    values = {"name": "heads", "data": {"train": "rows.jsonl"}, "adapter": adapter, "train": {"precision": "fp32"}}
    return method_of(parse_recipe(values, "recipe"), BaseModel("base", base), targets, spectra)


@pytest.mark.parametrize("name", METHODS)
def test_the_head_is_trained_saved_and_read_again(base: Path, name: str, tmp_path: Path) -> None:
    check_head(base, name, tmp_path)


@pytest.mark.parametrize("name", ["lora", "layernorm", "full"])
def test_so_is_a_pooler_that_begins_with_it(name: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = write_encoder(tmp_path / "base", "bert")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**sizes, vocab_size=100)).save_pretrained(base)
    assert head_modules(load_base(base, "fp32", HEAD)) == ["bert.pooler", "classifier"]
    check_head(base, name, tmp_path)


def check_head(base: Path, name: str, tmp_path: Path) -> None:
    model = load_base(base, "fp32", HEAD, 0).eval()
    whole = head_modules(model)
    adapted = build(name, base, model, tmp_path).attach(model, 0, 100, whole, HEAD)
    in_head = [path for path in adapted.parameters if is_within(path, whole)]
    assert in_head
    assert all(parameter.requires_grad for parameter in adapted.parameters.values())
    generator = torch.Generator().manual_seed(1)
    values = {
        path: parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
        for path, parameter in adapted.parameters.items()
    }
    adapted.save(tmp_path / "adapter", values)
    with torch.no_grad():
        for path, parameter in adapted.parameters.items():
            parameter.copy_(values[path])
        expected = model(**BATCH).logits
        ours = load_model(base, tmp_path / "adapter", "fp32", HEAD, seed=5).model
        torch.testing.assert_close(ours(**BATCH).logits, expected, atol=1e-5, rtol=1e-4)
        assert (load_base(base, "fp32", HEAD, 5).eval()(**BATCH).logits - expected).abs().max() > 1e-3
        if name != "full":
            assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == whole
            theirs = peft.PeftModel.from_pretrained(load_base(base, "fp32", HEAD, 5), tmp_path / "adapter").eval()
            torch.testing.assert_close(theirs(**BATCH).logits, expected, atol=1e-5, rtol=1e-4)


def test_the_norms_of_a_head_are_no_targets(base: Path) -> None:
    model = load_base(base, "fp32", HEAD, 0)
    before = norm_names(model)
    model.classifier.norm = nn.LayerNorm(4)
    assert norm_names(model) == before
    assert before


ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "pad_token_id": 0,
    **ATTENTION,
}
FEEDFORWARD = {
    "llama": "model.layers.{}.mlp.down_proj",
    "olmo": "model.layers.{}.mlp.down_proj",  # of a type that PEFT's own list lacks, as the next
    "phi3": "model.layers.{}.mlp.down_proj",
    "qwen3": "model.layers.{}.mlp.down_proj",  # with an attention that is wider than the layer, too
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "opt": "model.decoder.layers.{}.fc2",
    "bert": "bert.encoder.layer.{}.output.dense",  # and not that of the attention, which has the same name
    "mixtral": "",  # its experts are no modules of their own
}


@pytest.mark.parametrize("kind", FEEDFORWARD)
def test_what_ends_a_feedforward_block_and_what_normalises_is_known_by_shape(kind: str) -> None:
    more = {"qwen3": {"head_dim": 16}, "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32}}.get(kind, {})
    config = AutoConfig.for_model(kind, **SIZES, **more)
    with torch.device("meta"):
        kinds = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
        model = kinds.from_config(config)
    name = FEEDFORWARD[kind]
    targets = outline_of(model).linear
    found = _feedforward_names(model, targets)
    assert found == [name.format(layer) for layer in range(config.num_hidden_layers) if name]
    assert not _feedforward_names(model, [target for target in targets if target.name not in found])
    norms = [
        path
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
    ]
    assert norm_names(model) == norms
    assert bool(norms) == (kind != "olmo")  # which normalises without weights
