"""Log-likelihoods of choices against the plain way to compute them; which choice an answer names; what is asked beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pipeline.config.settings import EvaluateSettings
from pipeline.core.errors import RecipeError
from pipeline.data.prepared import load_prepared
from pipeline.evaluation.results import (
    check_suitable,
    continuation_ids,
    named_choice,
    right_choice,
    score_choices,
    without_reasoning,
)
from pipeline.evaluation.worker import log_likelihoods
from pipeline.models.prompting import Prompting

QUESTION = {"question": "which counts?", "choices": ["from one", "done", "three 4 5 done"], "answer": 1}


def plainly(model: Any, prompt: list[int], ids: list[int]) -> float:
    """One whole sequence at a time, without padding or cache."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(dim=-1)
    return sum(float(logits[len(prompt) + place - 1, token]) for place, token in enumerate(ids))


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, base: Path) -> Any:
    if request.param == "llama":
        return AutoModelForCausalLM.from_pretrained(base).eval()
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()


def test_log_likelihoods_are_those_of_each_sequence_alone(model: Any) -> None:
    prompts = [[5, 9, 30, 41, 7], [8], [100, 2, 3]]
    continuations = [[[4, 5, 6], [7]], [[9, 9], [10, 11, 12, 13], [14]], [[20]]]
    found = log_likelihoods(model, prompts, continuations)
    for prompt, several, ours in zip(prompts, continuations, found, strict=True):
        assert ours == pytest.approx([plainly(model, prompt, ids) for ids in several], abs=2e-5)
    single = log_likelihoods(model, prompts[:1], [[[4], [7]]])  # no second pass at all
    assert single[0] == pytest.approx([plainly(model, prompts[0], [4]), plainly(model, prompts[0], [7])], abs=2e-5)


def test_a_choice_ends_before_eos_and_takes_the_space_before_it(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompting = Prompting("Q: {prompt} A: ")
    ids = continuation_ids(prompting, tokenizer, "count", "from done")
    assert tokenizer.decode(ids) == " from done"
    assert prompting.prompt_ids(tokenizer, "count") + ids == tokenizer("Q: count A: from done")["input_ids"]


def test_both_ways_to_score() -> None:
    # -4 is the likeliest, -6 over 6 characters the likeliest by length.
    scored = score_choices([-4.0, -6.0], ["ab", "abcdef"], right=1)
    assert (scored["choice"], scored["accuracy"], scored["accuracy_norm"]) == ("ab", 0.0, 1.0)
    assert score_choices([-1.0, -1.0], ["a", "b"], right=0)["accuracy"] == 1.0  # of equals the first
    assert score_choices([-1.0, -2.0], ["a", "b"], right=None)["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("output", "place"),
    [
        ("the correct answer is answer2", 1),
        ("answer1, not answer2", 0),
        ("answer10.", 2),
        ("Answer2", None),
        ("myanswer1", None),
        ("", None),
    ],
)
def test_the_first_label_that_is_named(output: str, place: int | None) -> None:
    assert named_choice(output, ["answer1", "answer2", "answer10"]) == place


def test_the_right_choice_is_the_reference() -> None:
    assert right_choice([" b "], ["a", "b"]) == 1
    assert right_choice(["c"], ["a", "b"]) is None
    assert right_choice([], ["a", "b"]) is None


@pytest.mark.parametrize(
    ("rows", "settings", "says"),
    [
        ([{"text": "plain"}], {"kind": "text"}, r"heldout\.jsonl:1 is plain text .*set evaluate\.kind: loss"),
        ([{"text": "plain"}], {"kind": "loss"}, None),
        ([{"prompt": "p", "completion": "c"}], {"kind": "choice"}, r"heldout\.jsonl:1 .* has none; name them in evaluate\.choices"),
        ([{"prompt": "p", "completion": "c"}], {"kind": "choice", "choices": ["a", "b"]}, r"'c' of .* is none of a, b"),
        ([{"prompt": "p", "completion": "b"}], {"kind": "choice", "choices": ["a", "b"]}, None),
        ([QUESTION], {"kind": "choice"}, None),
        ([QUESTION], {"kind": "text"}, None),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_said_beforehand(
    prepared: Callable[..., Path], rows: list[dict[str, Any]], settings: dict[str, Any], says: str | None
) -> None:
    data, evaluate = load_prepared(prepared(rows)), EvaluateSettings(**settings)
    if says is None:
        check_suitable(evaluate, data.heldout, data.summary["form"])
        return
    with pytest.raises(RecipeError, match=says):
        check_suitable(evaluate, data.heldout, data.summary["form"])


def test_the_answer_after_reasoning() -> None:
    assert without_reasoning("<think>\nA or B?\n</think>\n\nB", ["B"]) == "B"
    assert without_reasoning("A or B?</think>B", ["B"]) == "B"  # the prompt opened the block
    assert without_reasoning(" B ", ["B"]) == " B "
    assert without_reasoning("<think>\nA or", ["B"]) == "<think>\nA or"  # no answer at all
    learned = "<think>\nB.\n</think>\n\nB"
    assert without_reasoning(learned, [learned]) == learned
