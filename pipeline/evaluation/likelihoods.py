"""How likely each continuation of a prompt is to a model.

Legend: B = prompts, C = continuations of more than one token, T = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from pipeline.language_model import IGNORED, limits_logits

Ids = Sequence[int]


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
