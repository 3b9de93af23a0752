"""Generation: where answers end, and that nothing of the base's generation settings changes them otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.core.errors import BaseModelError
from pipeline.serving.inference import load_model

TOKENS = ["<0>", "<1>", "Q", "A", "B", "Z", "R"]
NEXT = {2: 3, 3: 4, 4: 1, 1: 5, 5: 5, 0: 5, 6: 6}  # Q, A, B, <1>, Z, Z, ...


def write_base(folder: Path, eos: str = "<0>", **generation: Any) -> Path:
    """A base that knows one answer: `AB<1>ZZZ...`."""
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        for token, following in NEXT.items():
            model.model.embed_tokens.weight[token, token] = 1.0
            model.lm_head.weight[following, token] = 1.0
    model.generation_config = GenerationConfig(**{"eos_token_id": 0, **generation})
    model.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="Z"))
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos).save_pretrained(folder)
    return folder


def changed(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    "where", ["generation_config.json", "config.json", "tokenizer"], ids=["generation", "config", "tokenizer"]
)
def test_an_answer_ends_at_every_id_that_base_or_tokenizer_declare(tmp_path: Path, where: str) -> None:
    folder = write_base(tmp_path / "base", eos="<1>" if where == "tokenizer" else "<0>")
    assert load_model(write_base(tmp_path / "other"), None, "fp32").generate([[2]], 8) == ["AB<1>ZZZZZ"]
    if where != "tokenizer":
        changed(folder, where, eos_token_id=[0, 1])
    assert load_model(folder, None, "fp32").generate([[2], [6, 2]], 8) == ["AB", "AB"]


GREEDY_NO_MORE: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": [3]},
    {"begin_suppress_tokens": [3]},
    {"repetition_penalty": 9.0},
    {"bad_words_ids": [[4]]},
    {"forced_eos_token_id": 5},
    {"sequence_bias": [[[6], 99.0]]},
    {"min_new_tokens": 6},
    {"num_beams": 3, "length_penalty": -5.0},
    {"do_sample": True, "temperature": 50.0, "top_k": 7},
    {"exponential_decay_length_penalty": [1, 9.0]},
    {"max_time": 1e-9},
    {"stop_strings": ["A"]},
]


@pytest.mark.parametrize("asked", GREEDY_NO_MORE, ids=lambda asked: next(iter(asked)))
def test_nothing_else_of_its_generation_settings_counts(tmp_path: Path, asked: dict[str, Any]) -> None:
    folder = changed(write_base(tmp_path / "base"), "generation_config.json", eos_token_id=[0, 1], **asked)
    loaded = load_model(folder, None, "fp32")
    assert loaded.generate([[2]], 8) == ["AB"]
    # lm-evaluation-harness calls the model itself.
    ids = loaded.model.generate(input_ids=torch.tensor([[2]]), max_new_tokens=8)  # type: ignore[operator]
    assert ids.tolist() == [[2, 3, 4, 1]]


def test_nor_do_those_in_an_old_config_json(tmp_path: Path) -> None:
    folder = changed(write_base(tmp_path / "base"), "config.json", repetition_penalty=9.0, eos_token_id=[0, 1])
    (folder / "generation_config.json").unlink()
    assert load_model(folder, None, "fp32").generate([[2]], 8) == ["AB"]


def test_a_token_without_an_embedding_is_named_and_no_padding(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", eos_token_id=[0, 1])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    loaded = load_model(folder, None, "fp32")
    assert loaded.generate([[2], [6, 6, 2]], 4) == ["AB", "AB"]
    with pytest.raises(BaseModelError, match=r"token 7, '\[PAD\]'.* 0 to 6"):
        loaded.generate([[7]], 4)
