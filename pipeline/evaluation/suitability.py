"""Checks before training that the evaluation at its end will be possible: of the held-out samples and of the harness."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from kasa.errors import nearest
from pipeline.config.evaluate import EvaluateSettings, HarnessSettings
from pipeline.core.errors import RecipeError
from pipeline.data.prepared import PreparedDataset
from pipeline.evaluation.choices import choices_of, right_choice


def check_suitable(settings: EvaluateSettings, prepared: PreparedDataset) -> None:
    """Check that the held-out samples have what the evaluation needs.

    Raises:
        RecipeError: the samples are plain text without a prompt, have no choices, or an answer that is none of them.
    """
    if settings.kind in ("loss", "classification", "regression"):
        return
    heldout = prepared.heldout.select_columns(["references", "choices", "choice_labels", "source"])
    form = prepared.summary["form"]
    for sample in heldout:
        if not sample["references"]:
            raise RecipeError(
                f"evaluate.kind: {settings.kind} needs prompts with answers, but {sample['source']} is plain text (data of "
                f"form {form}); set evaluate.kind: loss, which measures loss and perplexity"
            )
        if settings.kind != "choice":
            continue
        choices, _ = choices_of(sample, settings.choices)
        if not choices:
            raise RecipeError(
                f"evaluate.kind: choice needs choices, but {sample['source']} (data of form {form}) has none; name them in "
                "evaluate.choices, or use data of form multiple-choice or llm-adapters"
            )
        if right_choice(sample["references"], choices) is None:
            raise RecipeError(
                f"evaluate.choices: the answer {sample['references'][0]!r} of {sample['source']} is none of "
                f"{', '.join(choices)}"
            )


def check_harness(evaluate: EvaluateSettings, head: str) -> None:
    """Check that the tasks of lm-evaluation-harness can be run here.

    Raises:
        RecipeError: the harness is not installed, has no such task, or the model is no language model.
    """
    settings = evaluate.harness
    if not settings.tasks:
        return
    if head != "language-model":
        raise RecipeError(f"evaluate.harness: lm-evaluation-harness asks language models, and base.head is {head}")
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(
            "evaluate.harness needs lm-evaluation-harness: pip install 'kasa-pipeline[harness]'; or leave it out"
        )
    if settings.include is not None and not Path(settings.include).is_dir():
        raise RecipeError(f"evaluate.harness.include: {settings.include} is no folder")
    _check_names(settings)


def _check_names(settings: HarnessSettings) -> None:
    from lm_eval.tasks import TaskManager

    known: Any = TaskManager(include_path=settings.include)
    for task in settings.tasks:
        if not known.match_tasks([task]):
            raise RecipeError(
                f"evaluate.harness.tasks: lm-evaluation-harness has no task {task!r}{nearest(task, known.all_tasks)}; "
                "`lm_eval ls tasks` lists them, and evaluate.harness.include names a folder of your own"
            )
