"""A model on paper answers a plan as the model itself does, and is drawn once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from kasa.errors import TargetError
from kasa.targets import select_targets
from pipeline.apps.plan import checked_targets, estimate
from pipeline.config.recipe import Recipe, parse_recipe
from pipeline.models import paper
from pipeline.models.paper import PaperModel, draw, planned_model
from pipeline.models.prompting import head_modules
from pipeline.models.shapes import base_outline, meta_model

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
LLAMA = {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True, **TINY}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300}


def recipe(head: str) -> Recipe:
    values = {"name": "tiny", "data": {"train": "rows.jsonl"}, "base": {"model": "./base", "head": head}}
    return parse_recipe({**values, "adapter": {"rank": 4}, "train": {"deepspeed": "cpu_zero3", "workers": 2}}, "here")


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (LLAMA, "language-model"),
        (LLAMA, "classification"),
        (GPT2, "language-model"),
        ({"model_type": "roberta", **TINY}, "classification"),
        ({"model_type": "deberta-v2", **TINY}, "regression"),
        ({"model_type": "mixtral", "num_local_experts": 2, **TINY}, "language-model"),
    ],
)
def test_a_plan_sees_no_difference(config: dict[str, Any], head: Any) -> None:
    real = meta_model(AutoConfig.for_model(**config), head)
    drawn: Any = PaperModel(json.loads(json.dumps(draw(real))))
    assert base_outline(drawn, head) == base_outline(real, head)
    if head != "language-model":
        assert head_modules(drawn) == head_modules(real)
    plans = [estimate(recipe(head), one, checked_targets(recipe(head), one)) for one in (real, drawn)]
    assert plans[0] == plans[1]
    with pytest.raises(TargetError) as of_real:
        select_targets(base_outline(real, head), ["q_prj"])
    with pytest.raises(TargetError) as of_drawn:
        select_targets(base_outline(drawn, head), ["q_prj"])
    assert str(of_real.value) == str(of_drawn.value)


def test_it_is_drawn_once_for_each_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KASA_CACHE", str(tmp_path / "cache"))
    drawings: list[object] = []
    monkeypatch.setattr(paper, "draw", lambda model: drawings.append(model) or draw(model))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    settings = recipe("language-model").base

    def parameters() -> int:
        model = planned_model(settings, tmp_path)
        assert model is not None
        return sum(one.numel() for one in model.parameters())

    first = parameters()
    assert parameters() == first
    assert len(drawings) == 1
    (kept,) = (tmp_path / "cache" / "shapes").iterdir()
    kept.write_text('{"parts": {}}')
    assert parameters() == first
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 3}))
    assert parameters() > first
    assert len(drawings) == 3
