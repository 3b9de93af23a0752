"""A method with a start of its own is an entry and a module: nothing else has to know of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kasa import find_targets
from pipeline.apps.compared_methods import compared_methods, method_names, trial, trial_keys
from pipeline.apps.recipe_docs import recipe_page
from pipeline.config.methods import METHODS, MethodSpec
from pipeline.config.recipe import Recipe
from pipeline.core.errors import RecipeError
from pipeline.methods.choice import check_method, check_registrable, method_of
from pipeline.methods.loading import attach_folder
from pipeline.models.base import BaseModel
from pipeline.models.loading import load_base
from tests.support.small_training import small_base

SPEC = MethodSpec(
    "spare",
    "LoRA that starts from the weight's first rows",
    "tests.pipeline.methods.spare_method",
    largest_stage=2,
    stage_reason="it reads whole base weights",
)


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, SPEC.name, SPEC)


@pytest.mark.usefixtures("_known")
def test_what_is_asked_before_it_is_built(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"adapter\.method: there is no such method; did you mean spare\?"):
        recipe({"adapter.method": "spair"})
    chosen = recipe({"adapter.method": "spare"})
    assert not chosen.decomposes
    check_method(chosen, {"zero_optimization": {"stage": 2}})
    with pytest.raises(RecipeError, match="spare works up to ZeRO stage 2, for it reads whole base weights"):
        check_method(chosen, {"zero_optimization": {"stage": 3}})
    with pytest.raises(RecipeError, match="--methods kasa,spare"):
        check_registrable(chosen)
    assert "| `spare` | LoRA that starts from the weight's first rows |" in recipe_page()


@pytest.mark.usefixtures("_known")
def test_it_is_compared_built_saved_and_loaded(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    small_base(tmp_path)
    folder = tmp_path / "base"
    model = load_base(folder, "fp32").eval()
    targets = find_targets(model, "all-linear")
    assert method_names("kasa,spare") == ["kasa", "spare"]
    compared, lora = compared_methods(recipe(), ["spare", "lora"], targets, model)
    assert compared.parameters == lora.parameters
    keys = [trial_keys(trial(one, 0, 1e-3), "b", "s", targets) for one in (compared, lora)]
    assert keys[0].keys() == keys[1].keys()
    assert keys[0]["train"].key != keys[1]["train"].key

    method = method_of(compared.recipe, BaseModel("base", folder), targets, None)
    adapted = method.attach(model, 0, 10)
    assert sum(parameter.numel() for parameter in adapted.parameters.values()) == compared.parameters
    values = {name: value.detach() + 0.05 for name, value in adapted.parameters.items()}
    adapted.save(tmp_path / "adapter", values)
    loaded: Any = load_base(folder, "fp32").eval()
    attach_folder(loaded, tmp_path / "adapter")
    token_ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        for name, parameter in adapted.parameters.items():
            parameter.copy_(values[name])
        torch.testing.assert_close(loaded(token_ids).logits, model(token_ids).logits)  # type: ignore[operator]
