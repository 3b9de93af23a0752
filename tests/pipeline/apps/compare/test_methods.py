"""Names, budgets and what a comparison refuses before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kasa import find_targets
from pipeline.apps.compared_methods import (
    DEFAULT_RATES,
    choose_rate,
    comparable,
    compared_methods,
    method_names,
    plan_comparison,
    trial,
    trial_keys,
    tuned_rates,
)
from pipeline.config.recipe import Recipe
from pipeline.core.errors import RecipeError
from pipeline.methods.choice import method_of
from pipeline.run import graph as keys
from pipeline.run.dependencies import KeyInputs

Build = Callable[..., Recipe]
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
)


def meta() -> Any:
    with torch.device("meta"):
        return LlamaForCausalLM(CONFIG)


class Base:
    name, folder = "base", None


def test_names() -> None:
    assert method_names("base, kasa:loss,lora") == ["kasa:loss", "lora"]
    with pytest.raises(RecipeError, match="no method 'lroa'; did you mean lora"):
        method_names("kasa,lroa")
    with pytest.raises(RecipeError, match="names lora twice"):
        method_names("lora,lora")
    with pytest.raises(RecipeError, match="names no method to train"):
        method_names("base")


@pytest.mark.parametrize("name", comparable())
def test_what_is_counted_is_what_is_trained(recipe: Build, name: str) -> None:
    model = meta()
    targets = find_targets(model, "all-linear")
    (compared,) = compared_methods(recipe({"adapter.truncation": "none"}), [name], targets, model)
    if compared.recipe.decomposes:
        pytest.skip("needs spectra; trains as many as kasa:none or lora")
    real = LlamaForCausalLM(CONFIG)
    made = compared.recipe
    method = method_of(made, Base(), targets, None)  # type: ignore[arg-type]
    if made.adapter.method == "kasa":
        from kasa import attach

        attach(real, targets, method.config)  # type: ignore[attr-defined]
        trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    else:
        trained = sum(p.numel() for p in method.attach(real, 0, 100).parameters.values())
    assert trained == compared.parameters


@pytest.mark.parametrize("rank", [4, 16])
def test_every_method_with_a_rank_comes_near_the_budget(recipe: Build, rank: int) -> None:
    model = meta()
    targets = find_targets(model, "all-linear")
    given = recipe({"adapter.rank": rank, "adapter.truncation": "weight"})
    found = {one.name: one for one in compared_methods(given, comparable(), targets, model)}
    budget = found["kasa"].parameters
    for name, one in found.items():
        adapter = one.recipe.adapter
        if adapter.spec.parameters is None or (adapter.method, adapter.rank) in (("vera", 1024), ("fourierft", 2048)):
            continue
        # One unit of rank: AdaLoRA goes from one and a half times 2 to one and a half times 3.
        assert abs(one.parameters - budget) <= 1.01 * budget / rank, name
        if adapter.method not in ("vera", "fourierft"):
            assert adapter.alpha / adapter.rank == given.adapter.alpha / rank


def test_a_trial_needs_the_spectra_that_its_method_begins_with(recipe: Build) -> None:
    model = meta()
    targets = find_targets(model, "all-linear")
    for name, stages in {
        "kasa": {"prepare", "spectra", "audit", "train", "evaluate"},
        "kasa:none": {"prepare", "train", "evaluate"},
        "lora": {"prepare", "train", "evaluate"},
        # Which drops nothing that would have to be audited.
        "corda": {"prepare", "spectra", "train", "evaluate"},
    }.items():
        (one,) = compared_methods(recipe(), [name], targets, model)
        assert set(trial_keys(trial(one, 0, 1e-3), "b", "s", targets)) == stages
        assert "evaluate" not in trial_keys(trial(one, 0, 1e-3, is_tuning=True), "b", "s", targets)


def test_the_recipes_own_kasa_in_a_comparison_is_the_training_of_a_run(recipe: Build) -> None:
    model = meta()
    targets = find_targets(model, "all-linear")
    (one,) = compared_methods(recipe(), ["kasa"], targets, model)
    tried = trial_keys(trial(one, recipe().train.seed, recipe().train.learning_rate), "b", "s", targets)["train"]
    assert tried == keys.stage_keys(KeyInputs(recipe(), "b", "s", targets))["train"]


def test_the_spectra_of_corda_are_its_own_and_know_no_gradients(recipe: Build) -> None:
    def made(**changes: Any) -> tuple[str, dict[str, Any]]:
        key = keys.stage_keys(KeyInputs(recipe(changes)))["spectra"]
        return key.key, key.ingredients["settings"]

    corda, activation = {"adapter.method": "corda"}, {"adapter.truncation": "activation"}
    assert made(**corda)[1]["gradients"] is False
    assert made(**corda)[0] == made(**corda, **activation)[0] != made(**activation)[0]
    assert made(**corda, **{"adapter.rank": 4})[1]["rank"] == 4


def test_methods_seeds_and_rates_train_anew_and_what_a_method_has_no_use_for_does_not(recipe: Build) -> None:
    def key(changes: dict[str, Any]) -> str:
        given = recipe({"adapter.method": "lora"} | changes)
        return keys.stage_keys(KeyInputs(given, until="train"))["train"].key

    assert key({}) == key({"adapter.truncation": "weight"}) == key({"adapter.regulariser": "paper"})
    assert len({key({}), key({"adapter.method": "dora"}), key({"adapter.rank": 4}), key({"train.seed": 1})}) == 4
    assert key({"adapter.method": "ia3"}) == key({"adapter.method": "ia3", "adapter.rank": 4})


def test_a_comparison_has_one_name(recipe: Build) -> None:
    def name(**changes: Any) -> str:
        options = {"methods": ["kasa", "lora"], "seeds": 2, "seed_from": None, "rates": (), "against": None} | changes
        return plan_comparison(recipe(), **options).name

    assert name() == name(seed_from=0) == name(against="lora")
    assert len({name(), name(seeds=3), name(methods=["lora"]), name(rates=(1e-4, 1e-3)), name(against="base")}) == 5
    with pytest.raises(RecipeError, match="--against dora is not compared here"):
        name(against="dora")
    assert plan_comparison(recipe(), ["kasa"], 1, 5, (), None).against == "base"
    assert plan_comparison(recipe(), ["kasa"], 3, 5, (), None).seeds == (5, 6, 7)


def test_what_a_method_cannot_do_is_said_before_anything_is_fetched(recipe: Build) -> None:
    sharded = recipe({"train.deepspeed": "cpu_zero3"})
    plan_comparison(sharded, ["kasa", "lora"], 1, None, (), None)
    with pytest.raises(RecipeError, match=r"corda works up to ZeRO stage 2"):
        plan_comparison(sharded, ["kasa", "corda"], 1, None, (), None)


def test_starting_from_a_champion_is_refused(recipe: Build) -> None:
    with pytest.raises(RecipeError, match="starts every method from scratch"):
        plan_comparison(recipe({"train.start": "champion"}), ["kasa", "lora"], 1, None, (), None)
    with pytest.raises(RecipeError, match=r"warm-starts from a KaSA adapter, and adapter\.method is lora"):
        recipe({"train.start": "champion", "adapter.method": "lora"})


def test_tuning_needs_validation_samples(recipe: Build) -> None:
    tunable = recipe({"data.validation_rows": 8})
    assert tuned_rates(None, recipe()) == ()
    assert tuned_rates("lr", tunable) == DEFAULT_RATES
    assert tuned_rates("learning_rate=1e-3,1e-4", tunable) == (1e-4, 1e-3)
    for text, said in (
        ("rank=1,2", "only the learning rate"),
        ("lr=fast", "no list of numbers"),
        ("lr=1e-3", "at least two"),
        ("lr=-1,1", "above 0"),
        ("lr=1e-3,inf", "at most 1e\\+06"),
        ("lr=1e-3,nan", "above 0"),
    ):
        with pytest.raises(RecipeError, match=said):
            tuned_rates(text, tunable)
    with pytest.raises(RecipeError, match=r"set data\.validation_rows"):
        tuned_rates("lr", recipe())


def test_the_lowest_validation_loss_wins() -> None:
    chosen = choose_rate((1e-4, 1e-3, 1e-2), {1e-4: 2.0, 1e-3: 1.0})
    assert chosen is not None
    assert (chosen.rate, chosen.at_edge) == (1e-3, False)
    edge = choose_rate((1e-4, 1e-3), {1e-4: 1.0, 1e-3: 1.0})
    assert edge is not None
    assert (edge.rate, edge.at_edge) == (1e-4, True)
    assert choose_rate((1e-4,), {}) is None
