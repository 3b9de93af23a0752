"""Every method through the pipeline's own training worker: it learns, resumes bit for bit, and loads onto the untouched base
as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kasa import find_targets
from kasa.weighting import Weighting
from pipeline.core.errors import RecipeError
from pipeline.methods.choice import check_method, check_registrable
from pipeline.methods.loading import attach_folder, merge_other
from pipeline.methods.residual import initial_factors
from pipeline.spectra.decomposition import leading_triplets
from tests.support import ROOT
from tests.support.ranks import start_ranks

# Each group is trained once, not once in every test process.
pytestmark = pytest.mark.xdist_group("methods")


# Stage, precision, processes, methods.
GROUPS = {
    "0 fp32": ("0", "fp32", 1, ["adalora", "lora"]),
    "2 fp32": ("2", "fp32", 2, ["kasa-without-d", "dora", "pissa", "milora", "olora", "corda", "rslora", "full"]),
    "1 bf16": ("1", "bf16", 1, ["vera", "fourierft", "ia3", "layernorm", "pissa"]),
}
# Of a loss in nats, between the engine's arithmetic and a model loaded anew.
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-3}


@pytest.fixture(scope="module", params=GROUPS)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """What the ranks found out about a group of methods, and their folder."""
    stage, precision, workers, methods = GROUPS[request.param]
    folder = tmp_path_factory.mktemp("methods")
    environment = {"PYTHONPATH": str(ROOT)}
    ranks = start_ranks(
        "tests.pipeline.methods.method_script", [str(folder), stage, precision, *methods], workers, folder, environment
    )
    try:
        for process in ranks.processes:
            process.wait(timeout=1200)
        ranks.wait()
    finally:
        ranks.kill()
    return request.param, folder, json.loads((folder / "result.json").read_text())


@pytest.mark.processes
def test_every_method_of_the_group(group: tuple[str, Path, dict[str, Any]]) -> None:
    name, _, found = group
    precision = GROUPS[name][1]
    for method in GROUPS[name][3]:
        facts = found[method]
        assert len(facts["losses"]) == 10, method
        assert facts["resumed"] == facts["losses"], method
        assert facts["differing"] == [], method
        # The adapter that is kept is that of the best look, and it is not the base.
        assert facts["loaded"] == pytest.approx(facts["best"], abs=TOLERANCES[precision]), method
        assert abs(facts["loaded"] - found["base"]) > 1e-4, method
        assert facts["trainable_parameters"] > 0, method


@pytest.mark.processes
def test_peft_itself_loads_what_was_saved(group: tuple[str, Path, dict[str, Any]]) -> None:
    name, folder, _ = group
    token_ids = torch.arange(1, 9)[None]
    for method in GROUPS[name][3]:
        adapter = folder / method / "whole" / "work" / "adapter"
        if not (adapter / "adapter_config.json").exists():
            assert method in ("full", "kasa-without-d")
            continue
        ours, theirs = (AutoModelForCausalLM.from_pretrained(folder / "base") for _ in range(2))
        attach_folder(ours, adapter)
        theirs = peft.PeftModel.from_pretrained(theirs, adapter)
        with torch.no_grad():
            assert torch.equal(ours.eval()(token_ids).logits, theirs.eval()(token_ids).logits), method


@pytest.mark.processes
def test_merged_into_the_base_they_say_the_same(group: tuple[str, Path, dict[str, Any]]) -> None:
    name, folder, _ = group
    token_ids = torch.arange(1, 9)[None]
    for method in set(GROUPS[name][3]) - {"kasa-without-d"}:  # which `kasa.merge` merges
        adapter = folder / method / "whole" / "work" / "adapter"
        base, attached, merged = (AutoModelForCausalLM.from_pretrained(folder / "base") for _ in range(3))
        attach_folder(attached, adapter)
        merged = merge_other(merged, adapter)
        assert merged.state_dict().keys() == base.state_dict().keys(), method
        with torch.no_grad():
            wanted, logits = (model.eval()(token_ids).logits for model in (attached, merged))
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5, msg=method)
        assert not torch.allclose(logits, base.eval()(token_ids).logits, atol=1e-5), method


@pytest.mark.processes
def test_methods_that_change_the_base_are_saved_as_a_lora_of_twice_the_rank(
    group: tuple[str, Path, dict[str, Any]],
) -> None:
    name, folder, _ = group
    for method in {"pissa", "milora", "olora", "corda"} & set(GROUPS[name][3]):
        adapter = folder / method / "whole" / "work" / "adapter"
        settings = json.loads((adapter / "adapter_config.json").read_text())
        assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 16, 16)
        assert settings["init_lora_weights"] is True
        shapes = {tuple(t.shape) for n, t in load_file(adapter / "adapter_model.safetensors").items() if "lora_A" in n}
        assert shapes == {(16, 64), (16, 160)}


@pytest.mark.processes
def test_without_d_it_stays_one(group: tuple[str, Path, dict[str, Any]]) -> None:
    name, folder, _ = group
    if "kasa-without-d" not in GROUPS[name][3]:
        pytest.skip("not in this group")
    tensors = load_file(folder / "kasa-without-d" / "whole" / "work" / "adapter" / "tensors.safetensors")
    values = [tensor for key, tensor in tensors.items() if key.endswith(".d")]
    assert len(values) == 14
    assert all(bool((value == 1).all()) for value in values)


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)])
@pytest.mark.parametrize("method", ["pissa", "olora", "milora"])
def test_initial_factors_are_those_of_peft_and_of_a_full_svd(method: str, shape: tuple[int, int]) -> None:
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    b_OR, a_RI = initial_factors(method, weight_OI, 3, 2.0)
    part_OI = 2.0 * b_OR @ a_RI
    if method == "milora":
        left, values, right = torch.linalg.svd(weight_OI.double(), full_matrices=False)
        expected = (left[:, -3:] * values[-3:]) @ right[-3:]
        torch.testing.assert_close(part_OI, expected.float(), atol=1e-5, rtol=1e-4)
        return
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
    model[0].weight.data = weight_OI.clone()
    peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=method))
    torch.testing.assert_close(weight_OI - part_OI, model[0].base_layer.weight.data, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)])
def test_cordas_part_is_pefts(shape: tuple[int, int]) -> None:
    chance = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(shape, generator=chance)
    # Of very unequal features, without which it would be PiSSA's.
    inputs = torch.randn(64, shape[1], generator=chance) * torch.logspace(-0.5, 0.5, shape[1])
    found = leading_triplets(weight_OI, 3, "weight", Weighting(inputs.T @ inputs))
    b_OR, a_RI = initial_factors("corda", weight_OI, 3, 2.0, found)
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
    model[0].weight.data = weight_OI.clone()
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm")
    )
    preprocess_corda(model, config, run_model=lambda: model(inputs))
    peft.get_peft_model(model, config)
    torch.testing.assert_close(
        weight_OI - 2.0 * b_OR @ a_RI, model[0].base_layer.weight.data, atol=1e-3, rtol=1e-3
    )  # theirs inverts in fp32
    assert found.residual < 1e-9
    assert found.orthogonality < 1e-12
    pissa_b, pissa_a = initial_factors("pissa", weight_OI, 3, 2.0)
    assert (pissa_b @ pissa_a - b_OR @ a_RI).norm() > 0.1 * (b_OR @ a_RI).norm()


def test_cordas_part_of_a_weight_of_a_smaller_rank_is_all_of_it() -> None:
    chance = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(12, 2, generator=chance) @ torch.randn(2, 9, generator=chance)
    for weight in (weight_OI, weight_OI.T, torch.zeros(5, 7)):
        inputs = torch.randn(64, weight.shape[1], generator=chance)
        found = leading_triplets(weight, 4, "weight", Weighting(inputs.T @ inputs))
        b_OR, a_RI = initial_factors("corda", weight, 4, 0.5, found)
        torch.testing.assert_close(0.5 * b_OR @ a_RI, weight, atol=1e-5, rtol=1e-4)


def test_a_random_start_is_the_seeds() -> None:
    from pipeline.methods.peft import PeftMethod, PeftSettings

    def start(seed: int) -> dict[str, torch.Tensor]:
        config = LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
        )
        model = LlamaForCausalLM(config)
        torch.rand(1)  # whatever was drawn before does not matter
        method = PeftMethod("lora", PeftSettings(tuple(find_targets(model, "all-linear")), 2, 4.0, 0.0, "base"))
        return dict(method.attach(model, seed, 10).parameters)

    first, again, other = start(0), start(0), start(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_what_a_method_cannot_do_is_refused(recipe: Any) -> None:
    def stage(number: int) -> dict[str, Any]:
        return {"zero_optimization": {"stage": number}}

    for method, largest in {"adalora": 0, "pissa": 2, "milora": 2, "olora": 2, "corda": 2, "layernorm": 2}.items():
        chosen = recipe({"adapter.method": method, "train.precision": "fp32"})
        check_method(chosen, stage(largest))
        with pytest.raises(RecipeError, match=f"{method} works up to ZeRO stage {largest}"):
            check_method(chosen, stage(largest + 1))
    with pytest.raises(RecipeError, match=r"adalora needs train\.precision=fp32"):
        check_method(recipe({"adapter.method": "adalora", "train.precision": "bf16"}), stage(0))
    check_method(recipe({"adapter.method": "lora"}), stage(3))
    with pytest.raises(RecipeError, match=r"kasa compare RECIPE --methods kasa,lora"):
        check_registrable(recipe({"adapter.method": "lora"}))


def test_an_adapter_folder_that_is_damaged_is_named(tmp_path: Path) -> None:
    from kasa.errors import AdapterFileError

    model = torch.nn.Linear(2, 2)
    for content, said in (
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
        ("{}", r"adapter_model\.safetensors is missing"),
    ):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(AdapterFileError, match=said):
            attach_folder(model, tmp_path)
