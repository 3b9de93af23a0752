"""Whether held-out samples can be evaluated as the recipe says: asked before training, not after."""

from __future__ import annotations

from pipeline.errors import RecipeError
from pipeline.evaluation.choices import choices_of, right_choice
from pipeline.prepare.stage import PreparedDataset
from pipeline.settings import EvaluateSettings


def check_suitable(settings: EvaluateSettings, prepared: PreparedDataset) -> None:
    """Look for what the evaluation needs in the held-out samples.

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
