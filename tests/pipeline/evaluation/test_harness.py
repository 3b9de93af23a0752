"""Tasks of lm-evaluation-harness: what they say of every document is kept, and models are compared on the same documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.settings import EvaluateSettings, HarnessSettings
from pipeline.core.errors import RecipeError
from pipeline.evaluation.results import HarnessResult, check_harness, harness_rows, read_harness
from tests.support.harness_tasks import write_harness_tasks


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_harness_tasks(tmp_path / "tasks")


@pytest.mark.parametrize("limit", [None, 3])
def test_the_documents_results_are_kept(base: Path, tasks: Path, tmp_path: Path, limit: int | None) -> None:
    pytest.importorskip("lm_eval")
    from pipeline.evaluation.harness import HarnessJob, run_harness

    settings = HarnessSettings(tasks=["counting", "reading"], include=str(tasks), limit=limit)
    found = []
    for task in settings.tasks:
        run_harness(HarnessJob(base, None, "fp32", task, settings, 4, tmp_path / task / "harness.json"))
        found += read_harness(tmp_path / task)
    accuracy, by_length, perplexity = found
    assert [result.name for result in found] == ["counting/acc", "counting/acc_norm", "reading/word_perplexity"]
    assert [result.lower_is_better for result in found] == [False, False, True]
    for result in (accuracy, by_length):
        assert result.per_sample is not None
        assert len(result.per_sample) == (limit or 8)
        assert sum(result.per_sample.values()) / len(result.per_sample) == pytest.approx(result.value)
    assert perplexity.per_sample is None
    assert perplexity.value > 1


def test_models_are_compared_on_the_same_documents() -> None:
    scores = {"base": [0, 0, 0, 1, 1], "adapted": [1, 1, 0, 1, 1]}
    results = {
        name: [
            HarnessResult("t/acc", sum(values) / 5, False, {str(n): float(value) for n, value in enumerate(values)}),
            HarnessResult("t/word_perplexity", 20.0, True, None),
        ]
        for name, values in scores.items()
    }
    accuracy, perplexity = harness_rows(results)
    assert accuracy.values == {"base": 0.4, "adapted": 0.8}
    difference = accuracy.differences["base"]
    assert difference.estimate == pytest.approx(0.4)
    # Two of five that differ are no proof: the interval reaches below zero.
    assert -0.1 < difference.low < 0
    assert 0.4 < difference.high <= 1
    assert perplexity.differences == {}


def test_what_cannot_be_run_is_said_before_training(tasks: Path) -> None:
    pytest.importorskip("lm_eval")

    def settings(**harness: object) -> EvaluateSettings:
        return EvaluateSettings.model_validate({"harness": {"tasks": ["counting"], "include": str(tasks), **harness}})

    check_harness(EvaluateSettings(), "classification")
    check_harness(settings(), "language-model")
    for wrong, head, message in (
        (settings(tasks=["countin"]), "language-model", "has no task 'countin'; did you mean counting"),
        (settings(include="/nowhere"), "language-model", "/nowhere is no folder"),
        (settings(), "classification", "base.head is classification"),
    ):
        with pytest.raises(RecipeError, match=message):
            check_harness(wrong, head)


def test_settings_of_no_task_are_refused() -> None:
    for settings in ({"limit": 5}, {"include": "tasks"}):
        with pytest.raises(ValueError, match="no task is named; set tasks"):
            HarnessSettings.model_validate(settings)
    assert HarnessSettings(tasks=[], limit=5).limit == 5
