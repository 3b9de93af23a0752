"""Multiple choice: how likely each choice is after the prompt, and which one a generated answer names.

A choice's log-likelihood is the sum over its own tokens. As in lm-evaluation-harness the end of the answer (EOS) is no part of
it: a base model that would go on after the right word has still chosen it.

Legend: B = prompts, C = continuations of more than one token, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pipeline.language_model import IGNORED, limits_logits
from pipeline.prompting import Prompting

Ids = Sequence[int]


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


@torch.inference_mode()
def log_likelihoods(
    model: nn.Module, prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]]
) -> list[list[float]]:
    """The summed log-likelihood in nats of each continuation of each prompt.

    Each prompt is computed once; its keys and values serve all of its continuations, which share one further pass.
    """
    device = next(model.parameters()).device
    prompt_BT, mask_BT = _padded(prompts, left=True)
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": prompt_BT, "attention_mask": mask_BT, "position_ids": positions_BT}
    keep = {"logits_to_keep": 1} if limits_logits(model) else {}
    seen = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=True, **keep)
    first_BV = functional.log_softmax(seen.logits[:, -1].float(), dim=-1).cpu()

    owners = [(row, place) for row, several in enumerate(continuations) for place in range(len(several))]
    found = [[float(first_BV[row, ids[0]]) for ids in several] for row, several in enumerate(continuations)]
    longer = [(row, place) for row, place in owners if len(continuations[row][place]) > 1]
    if longer:
        rows_C = torch.tensor([row for row, _ in longer])
        seen.past_key_values.batch_select_indices(rows_C.to(device))
        ids_C = [continuations[row][place] for row, place in longer]
        inputs_CT, own_CT = _padded([ids[:-1] for ids in ids_C], left=False)
        labels_CT, _ = _padded([ids[1:] for ids in ids_C], left=False, fill=IGNORED)
        start_C1 = mask_BT.sum(dim=1)[rows_C, None]
        logits_CTV = model(
            input_ids=inputs_CT.to(device),
            attention_mask=torch.cat([mask_BT[rows_C], own_CT], dim=1).to(device),
            position_ids=(start_C1 + torch.arange(inputs_CT.shape[1])).to(device),
            past_key_values=seen.past_key_values,
            use_cache=True,
        ).logits
        # Flat: over a vocabulary that is not the last dimension, fp32 sums are off by 1e-4.
        losses = functional.cross_entropy(
            logits_CTV.float().flatten(0, 1), labels_CT.flatten().to(device), ignore_index=IGNORED, reduction="none"
        )
        for (row, place), loss in zip(longer, losses.view_as(labels_CT).sum(dim=1).tolist(), strict=True):
            found[row][place] -= loss
    return found


def _padded(rows: Sequence[Ids], left: bool, fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (rows, T) and a mask that is 1 where there is one."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), longest), fill), torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        columns = slice(longest - len(row), None) if left else slice(len(row))
        ids[place, columns] = torch.as_tensor(row, dtype=torch.long)
        mask[place, columns] = 1
    return ids, mask
