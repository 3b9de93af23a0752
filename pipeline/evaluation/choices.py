"""Rules of multiple choice: the choices of a sample, the likeliest of them, and the one that a generated answer names.

A choice's log-likelihood is the sum over its own tokens. As in lm-evaluation-harness, the end of the answer (EOS) does not
count: a base model that would continue after the right word has still chosen it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.models.prompting import Prompting


def choices_of(sample: Mapping[str, Any], given: Sequence[str]) -> tuple[list[str], list[str]]:
    """(choices, labels) of a sample: those `given` for all samples, or its own where none are given."""
    return (list(given), list(given)) if given else (list(sample["choices"]), list(sample["choice_labels"]))


def right_choice(references: Sequence[str], choices: Sequence[str]) -> int | None:
    """The index of the first reference among the choices; None where it is not among them."""
    said = references[0].strip() if references else ""
    return next((place for place, choice in enumerate(choices) if choice.strip() == said), None)


def score_choices(log_likelihoods: Sequence[float], choices: Sequence[str], right: int | None) -> dict[str, Any]:
    """Score the choices of a sample.

    Args:
        log_likelihoods: of each choice, in nats.
        choices: their texts.
        right: index of the right one; None where no choice is right.

    Returns:
        The likeliest `choice`, whether it is right (`accuracy`, the harness's `acc`), and whether the one of the largest
        log-likelihood per character is right (`accuracy_norm`, the harness's `acc_norm`).
    """
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
    """The index of the choice whose label comes first in a generated answer; None where none is named.

    This is how LLM-Adapters reads `the correct answer is answer3`. Case matters, a label must be a word of its own, and of
    labels that start at one position the longest counts.
    """
    pattern = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    found = re.search(rf"(?<!\w)(?:{pattern})(?!\w)", output)
    return labels.index(found[0]) if found else None


def continuation_ids(prompting: Prompting, tokenizer: Any, prompt: str, choice: str) -> list[int]:
    """A choice's token ids after the prompt, without EOS."""
    ids = prompting.answer_ids(tokenizer, prompt, choice)
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
