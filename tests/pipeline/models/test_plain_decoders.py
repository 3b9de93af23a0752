"""A plain decoder drawn from its configuration is the one that transformers builds, and whatever is not plain is left to it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.models.loading import draw_outline
from pipeline.models.paper import _CONFIG, draw, plain_outline
from pipeline.models.plain_decoders import FAMILIES, _Config, plain_decoder
from pipeline.models.shapes import KNOWN_SHAPES, meta_model

TINY: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "head_dim": 16, "bos_token_id": 0, "eos_token_id": [0, 1],
    "pad_token_id": 0,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "one head for all": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "dropout": {"attention_dropout": 0.1},
    "turned further": {"rope_parameters": LLAMA3_ROPE},
}


def built(folder: Path, kind: str, **changes: Any) -> Path:
    """A base as transformers stores it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TINY, **changes}))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_it_is_what_transformers_builds(tmp_path: Path, kind: str, change: str) -> None:
    folder = built(tmp_path / "base", kind, **CHANGES[change])
    values = json.loads((folder / "config.json").read_text())
    decoder = plain_decoder(values)
    assert decoder is not None
    model = meta_model(AutoConfig.from_pretrained(folder))
    assert json.loads(json.dumps(decoder.drawing(_CONFIG))) == json.loads(json.dumps(draw(model)))
    assert decoder.shapes == {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert plain_outline(folder, "language-model") == draw_outline(folder, "language-model")


@pytest.mark.parametrize("name", [name for name, values in KNOWN_SHAPES.items() if values["model_type"] in FAMILIES])
def test_built_in_shapes_are_plain(name: str) -> None:
    decoder = plain_decoder(KNOWN_SHAPES[name])
    assert decoder is not None
    model = meta_model(AutoConfig.for_model(**KNOWN_SHAPES[name]))
    assert json.loads(json.dumps(decoder.drawing(_CONFIG))) == json.loads(json.dumps(draw(model)))


@pytest.mark.parametrize("kind", FAMILIES)
def test_whatever_transformers_checks_of_a_configuration_is_checked(kind: str) -> None:
    of_all = {"transformers_version", "architectures", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
              "is_encoder_decoder", "problem_type"}  # fmt: skip
    checked = {field.name for field in dataclasses.fields(type(AutoConfig.for_model(kind)))}
    assert checked - of_all <= set(_Config.model_fields)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"hidden_size": 64.0},
        {"num_key_value_heads": True},
        {"num_key_value_heads": 3},
        {"num_attention_heads": 5},
        {"rms_norm_eps": "small"},
        {"attention_bias": 1},
        {"hidden_act": "relu"},
        {"pad_token_id": 300},
        {"eos_token_id": "end"},
        {"torch_dtype": "float17"},
        {"layer_types": ["full_attention"]},
        {"rope_scaling": {"rope_type": "llama3"}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"quantization_config": {"bits": 4}},
        {"auto_map": {"AutoConfig": "mine.C"}},
        {"model_type": "mixtral"},
        {"model_type": ["llama"]},
        {"vocab_size": None},
    ],
    ids=str,
)
def test_what_is_not_plain_is_left_to_transformers(change: dict[str, Any]) -> None:
    assert plain_decoder({"model_type": "llama", **TINY}) is not None
    assert plain_decoder({"model_type": "llama", **TINY, **change}) is None


def test_so_is_a_checkpoint_that_is_not_just_its_own(tmp_path: Path) -> None:
    folder = built(tmp_path / "base", "llama")
    file = folder / "model.safetensors"
    whole = load_file(file)
    assert plain_outline(folder, "language-model") is not None
    assert plain_outline(folder, "classification") is None
    name = "model.layers.1.mlp.up_proj.weight"
    for tensors in (
        {key: value for key, value in whole.items() if key != name},
        {**whole, "model.layers.2.mlp.up_proj.weight": torch.zeros(96, 64)},
        {**whole, name: torch.zeros(64, 96)},
    ):
        save_file(tensors, file, {"format": "pt"})
        assert plain_outline(folder, "language-model") is None


def test_it_needs_neither_torch_nor_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built(tmp_path / "base", "llama")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "transformers")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert plain_outline(folder, "language-model") is not None
