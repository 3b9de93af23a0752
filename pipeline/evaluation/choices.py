"""Multiple choice: which choices there are, which of them a model takes for the likeliest, and which one an answer names.

A choice's log-likelihood is the sum over its own tokens. As in lm-evaluation-harness the end of the answer (EOS) is no part of
it: a base model that would go on after the right word has still chosen it.

Whether held-out samples can be evaluated as the recipe says: asked before training, not after.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.config.evaluate import EvaluateSettings
from pipeline.core.errors import RecipeError
from pipeline.data.prepared import PreparedDataset
from pipeline.models.prompting import Prompting


def choices_of(sample: Mapping[str, Any], given: Sequence[str]) -> tuple[list[str], list[str]]:
    """(choices, labels) of a sample: the same `given` ones for all, or its own where there are none."""
    return (list(given), list(given)) if given else (list(sample["choices"]), list(sample["choice_labels"]))


def right_choice(references: Sequence[str], choices: Sequence[str]) -> int | None:
    """The place of the reference among the choices; None where it is none of them."""
    said = references[0].strip() if references else ""
    return next((place for place, choice in enumerate(choices) if choice.strip() == said), None)


def score_choices(log_likelihoods: Sequence[float], choices: Sequence[str], right: int | None) -> dict[str, Any]:
    """`choice` (the likeliest), and whether that is right: by log-likelihood (`accuracy`), and by log-likelihood over the
    choice's length in characters (`accuracy_norm`), as lm-evaluation-harness's `acc` and `acc_norm`."""
    likeliest = int(np.argmax(log_likelihoods))
    by_length = int(np.argmax(np.array(log_likelihoods) / [len(choice) for choice in choices]))
    return {
        "choices": list(choices),
        "log_likelihoods": list(log_likelihoods),
        "choice": choices[likeliest],
        "accuracy": float(likeliest == right),
        "accuracy_norm": float(by_length == right),
    }


def named_choice(output: str, labels: Sequence[str]) -> int | None:
    """The choice whose label comes first in a generated answer, as LLM-Adapters reads `the correct answer is answer3`.

    Case counts, and a label must stand as a word of its own. Of labels at one place the longest is meant.
    """
    pattern = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    found = re.search(rf"(?<!\w)(?:{pattern})(?!\w)", output)
    return labels.index(found[0]) if found else None


def continuation_ids(prompting: Prompting, tokenizer: Any, prompt: str, choice: str) -> list[int]:
    """A choice's token ids after the prompt, without EOS."""
    ids = prompting.answer_ids(tokenizer, prompt, choice)
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


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
