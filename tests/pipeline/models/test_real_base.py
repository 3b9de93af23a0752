"""What is tested on tiny random models elsewhere holds on trained weights: the embedded SmolLM2 with all its layers.

Trained weights have a spectrum without a gap at its bottom, layers that amplify rounding, and a tokenizer of many words.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import kasa
from kasa.adapter_file import SavedAdapter
from pipeline.config.settings import BaseSettings
from pipeline.models.base import BaseModel, find_base
from pipeline.models.embedded import embedded_path_if_present
from pipeline.models.loading import load_base
from pipeline.models.prompting import load_tokenizer
from pipeline.serving.logits import logits_of, text_sequences
from tests.support import ROOT
from tests.support.evaluations import against_harness
from tests.support.interchange import difference, layer_differences, random_adapter

pytestmark = [pytest.mark.model, pytest.mark.soak, pytest.mark.xdist_group("real-base")]

WEIGHTS = 210
# Square, tall and wide.
PARITY_LAYER = "model.layers.14."
# How much an adapter must at least move the logits for a comparison to mean anything.
LEAST_CHANGE = 0.05
QUESTIONS = [
    {"question": question, "choices": list(choices), "answer": right}
    for question, choices, right in (
        ("What do plants take in from the air?", ("carbon dioxide", "sand", "glass", "plastic bags"), 0),
        ("Which of these is a source of light?", ("the moon's far side", "a candle", "a mirror", "a window"), 1),
        ("A bird's wings are best suited to", ("digging", "swimming in lava", "flying", "reading"), 2),
        ("Ice turns into water when it is", ("painted blue", "left alone in a freezer", "weighed", "heated"), 3),
        ("How many legs does a spider have?", ("8", "6", "4", "2"), 0),
        ("Iron rusts in the presence of", ("a vacuum", "oxygen and water", "helium", "gold"), 1),
        ("The Earth goes around the Sun once a", ("day", "week", "year", "century, more or less"), 2),
        ("Which animal lays eggs?", ("a dog", "a cow", "a whale", "a hen"), 3),
    )
]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    """The base in the repository's workspace; `make demo` puts it there."""
    if embedded_path_if_present("smollm2-135m-instruct", ROOT / "workspace") is None:
        pytest.skip("the embedded base is not in the workspace")
    found = find_base(BaseSettings(), ROOT / "workspace")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def adapter(base: BaseModel) -> SavedAdapter:
    """A random adapter beside a truncation by activation, which leaves the model sane."""
    model, tokenizer = load_base(base.folder, "fp32"), load_tokenizer(base.folder)
    tokens = torch.tensor(tokenizer((ROOT / "LICENSE").read_text(encoding="utf-8"))["input_ids"])
    with kasa.observe_layers(model, base.targets("all-linear")) as sums, torch.inference_mode():
        for piece in tokens.split(512):
            model(input_ids=piece[None])
    made = random_adapter(base, "activation", sums.weighting)
    assert len(made.targets) == WEIGHTS
    return made


def test_seven_layers_against_peft_and_the_formula(base: BaseModel) -> None:
    targets = [target for target in base.targets("all-linear") if target.name.startswith(PARITY_LAYER)]
    layers = [layer_differences(base.weights.weight(target)) for target in targets]
    assert len(layers) == 7
    for name, bar in (("peft", 1e-4), ("fp32", 1e-5), ("fp64", 1e-12)):
        assert max(layer[name] for layer in layers) <= bar, name


def load_exported_lora(base: BaseModel, adapter: SavedAdapter, out: Path) -> nn.Module:
    """The adapter as PEFT loads it from `--format lora`, on the untouched base."""
    from peft import PeftModel

    kasa.export_lora(adapter, out)
    return PeftModel.from_pretrained(load_base(base.folder, "fp32"), str(out))


def load_merged(base: BaseModel, adapter: SavedAdapter, out: Path) -> nn.Module:
    """The model that `--format merged --dtype fp32` writes."""
    kasa.merge(adapter, base.folder, out, torch.float32)
    return load_base(out, "fp32")


@pytest.mark.parametrize("load", [load_exported_lora, load_merged], ids=["lora", "merged"])
def test_an_export_computes_what_the_adapter_does(
    base: BaseModel, adapter: SavedAdapter, load: Callable[..., nn.Module], tmp_path: Path
) -> None:
    sequences = text_sequences(base.folder)
    model = load_base(base.folder, "fp32")
    plain = logits_of(model, sequences)
    kasa.attach_saved(model, adapter)
    ours = logits_of(model, sequences)
    assert difference(ours, plain) > LEAST_CHANGE
    assert difference(logits_of(load(base, adapter, tmp_path / "exported"), sequences), ours) <= 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_base_is_left_as_it_was_bit_for_bit(base: BaseModel, adapter: SavedAdapter, precision: str) -> None:
    sequences = text_sequences(base.folder)[:1]
    model = load_base(base.folder, precision)
    weights = {name: bits(tensor).clone() for name, tensor in model.state_dict().items()}
    (logits,) = logits_of(model, sequences)

    def is_the_base() -> bool:
        now = {
            name.replace(".base.", "."): bits(tensor)
            for name, tensor in model.state_dict().items()
            if ".updates." not in name
        }
        assert now.keys() == weights.keys()
        same = all(torch.equal(now[name], weights[name]) for name in weights)
        return same and torch.equal(bits(logits_of(model, sequences)[0]), bits(logits))

    kasa.attach_saved(model, adapter)
    (adapted,) = logits_of(model, sequences)
    with kasa.disabled(model):
        assert is_the_base()
    kasa.fold(model)
    assert not is_the_base()
    with kasa.disabled(model):
        assert is_the_base()
    kasa.unfold(model)
    assert torch.equal(bits(logits_of(model, sequences)[0]), bits(adapted))
    kasa.fold(model)
    kasa.detach(model)
    assert is_the_base()


@pytest.mark.parametrize("template", ["Question: {prompt}\nAnswer: ", "{prompt}\n\nResponse: "])
def test_multiple_choice_is_scored_as_the_harness_does(base: BaseModel, template: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    found = against_harness(base.folder, QUESTIONS, template, tmp_path)
    assert found["samples"] == len(QUESTIONS)
    assert found["largest_difference"] < 1e-3
    assert found["ours"] == found["harness"]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: 0.0 and -0.0 are equal numbers."""
    return tensor.contiguous().view(torch.uint8)
