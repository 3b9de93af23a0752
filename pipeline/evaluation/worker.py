"""What each evaluation process does: load the model once, score its share of the held-out samples, journal each result.

An interrupted shard resumes where its journal ends. Samples are scored by losses, choices and generated answers, or by a
head's labels.

Legend: B = samples or their prompts, C = continuations of more than one token (or outputs of a head), T = tokens,
V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pipeline.config.settings import EvaluateSettings
from pipeline.core.files import JournalWriter, Record, read_journal
from pipeline.data.prepared import PreparedDataset, load_prepared, token_counts
from pipeline.evaluation.results import (
    choices_of,
    continuation_ids,
    named_choice,
    right_choice,
    score_choices,
    without_reasoning,
)
from pipeline.models.chat import Message
from pipeline.models.forward import IGNORED, Sample, collate, label_losses, limits_logits, sample_losses
from pipeline.models.prompting import Prompting
from pipeline.serving.inference import LoadedModel, load_model

Ids = Sequence[int]

# (samples, their numbers in the held-out split) -> a record per sample.
Scorer = Callable[[Sequence[Any], Sequence[int]], list[Record]]


def score_labels(loaded: LoadedModel, samples: Sequence[Any], indices: Sequence[int]) -> list[Record]:
    """Score samples with a trained head.

    Args:
        loaded: a model with a new head.
        samples: tokenised samples with their `label`.
        indices: their numbers in the held-out split.

    Returns:
        A record per sample. `loss_sum` is its cross entropy in nats, or its squared error. For a classification `label` and
        `prediction` are numbers of classes and `logits` has an entry for each; for a regression all are values.
    """
    head = loaded.head
    outputs_BC = loaded.outputs(samples)
    labels_B = torch.tensor([sample["label"] for sample in samples], dtype=torch.float64)
    losses = sample_losses(outputs_BC, labels_B, head).tolist()
    records: list[Record] = []
    for index, sample, loss, outputs in zip(indices, samples, losses, outputs_BC.tolist(), strict=True):
        result: Record = {"sample": index, "loss_sum": loss, "tokens": 1, "references": list(sample["references"])}
        if head.kind == "classification":
            chosen, label = outputs.index(max(outputs)), int(sample["label"])
            result |= {"label": label, "prediction": chosen, "accuracy": float(chosen == label)}
            result["output"] = head.classes[chosen]
        else:
            result |= {"label": sample["label"], "prediction": outputs[0], "output": f"{outputs[0]:.6g}"}
        records.append(result | {"logits": outputs})
    return records


@torch.inference_mode()
def score_texts(
    loaded: LoadedModel, samples: Sequence[Sample], indices: Sequence[int], settings: EvaluateSettings
) -> list[Record]:
    """Score samples with a language model.

    Args:
        loaded: a model with the base's own head.
        samples: tokenised samples with `references`, and with choices where the evaluation needs them.
        indices: their numbers in the held-out split.
        settings: what is measured.

    Returns:
        A record per sample: `loss_sum` in nats over its `tokens` labelled tokens, the scores of its choices
        (`score_choices`), and its generated `output` where one is measured or shown.
    """
    losses, counts = _summed_losses(loaded.model, samples)
    records: list[Record] = [
        {"sample": index, "loss_sum": loss, "tokens": count, "references": list(sample["references"])}
        for index, loss, count, sample in zip(indices, losses, counts, samples, strict=True)
    ]
    if settings.kind == "choice":
        _add_choices(loaded, samples, records, settings)
    _add_outputs(loaded, samples, records, settings)
    return records


def _add_choices(
    loaded: LoadedModel, samples: Sequence[Sample], records: Sequence[Record], settings: EvaluateSettings
) -> None:
    options = [choices_of(sample, settings.choices)[0] for sample in samples]
    found = log_likelihoods(
        loaded.model,
        [_prompt(sample) for sample in samples],
        [
            [continuation_ids(loaded.prompting, loaded.tokenizer, sample["prompt"], choice) for choice in choices]
            for sample, choices in zip(samples, options, strict=True)
        ],
    )
    for record, choices, likelihoods in zip(records, options, found, strict=True):
        record.update(score_choices(likelihoods, choices, right_choice(record["references"], choices)))


def _add_outputs(
    loaded: LoadedModel, samples: Sequence[Sample], records: Sequence[Record], settings: EvaluateSettings
) -> None:
    """Generate for all samples where a metric needs it, else for those that the report shows."""
    shown = [
        (sample, record)
        for sample, record in zip(samples, records, strict=True)
        if sample["prompt_tokens"] and (settings.generates or record["sample"] < settings.samples_shown)
    ]
    if not shown:
        return
    prompts = [_prompt(sample) for sample, _ in shown]
    outputs = loaded.generate(prompts, settings.max_new_tokens)
    for (sample, record), generated in zip(shown, outputs, strict=True):
        record["output"] = output = without_reasoning(generated, record["references"])
        if settings.extract:
            choices, labels = choices_of(sample, settings.choices)
            right = right_choice(record["references"], choices)
            record["accuracy_generated"] = float(right is not None and named_choice(output, labels) == right)
        elif settings.generates:
            record["exact_match"] = float(output in [reference.strip() for reference in record["references"]])


def _prompt(sample: Sample) -> list[int]:
    return list(sample["input_ids"][: sample["prompt_tokens"]])


def _summed_losses(model: nn.Module, samples: Sequence[Sample]) -> tuple[list[float], list[int]]:
    batch = collate(samples).to(next(model.parameters()).device)
    losses_BK = label_losses(model, batch)
    return losses_BK.sum(dim=1).tolist(), (batch.labels_BK >= 0).sum(dim=1).tolist()


@torch.inference_mode()
def log_likelihoods(
    model: nn.Module, prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]]
) -> list[list[float]]:
    """The summed log-likelihood in nats of each continuation of each prompt.

    Each prompt is computed once. Its keys and values serve all of its continuations, which share one further forward pass.

    Args:
        model: a causal language model.
        prompts: token ids.
        continuations: token ids of the continuations of each prompt, at least one token each.

    Returns:
        The log-likelihoods, in the order of `continuations`.
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
    """Padded ids of shape (rows, T), and a mask that is 1 at each id."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), longest), fill), torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        columns = slice(longest - len(row), None) if left else slice(len(row))
        ids[place, columns] = torch.as_tensor(row, dtype=torch.long)
        mask[place, columns] = 1
    return ids, mask


@dataclass(frozen=True)
class EvaluationShard:
    """One worker's share of the evaluation of one candidate: the batches `index`, `index + count`, ... of the samples.

    Attributes:
        base_folder: the base model of the candidate.
        adapter: its adapter; None for the plain base.
        prepared: folder of the prepared data.
        precision: `fp32` or `bf16`.
        settings: the recipe's `evaluate` section.
        index: number of this shard.
        count: how many shards there are.
        journal: file that results are appended to.
        seed: of an untrained head, where there is no adapter.
    """

    base_folder: Path
    adapter: Path | None
    prepared: Path
    precision: str
    settings: EvaluateSettings
    index: int
    count: int
    journal: Path
    seed: int = 0


def evaluate_shard(shard: EvaluationShard) -> int:
    """Score the samples of the shard that its journal lacks; returns how many results it then holds."""
    torch.set_num_threads(1)
    prepared = load_prepared(shard.prepared)
    samples = prepared.heldout
    batches = batches_of(token_counts(samples).tolist(), shard.settings.batch_size)[shard.index :: shard.count]
    known = {record["sample"] for record in read_journal(shard.journal)}
    whole = {index for batch in batches if known.issuperset(batch) for index in batch}
    journal = JournalWriter(shard.journal, keep=lambda record: record["sample"] in whole)
    left = [batch for batch in batches if not whole.issuperset(batch)]
    if left:
        score = _label_scorer(shard, prepared) if prepared.head.is_new else _text_scorer(shard, prepared)
        for batch in left:
            journal.append(score([samples[index] for index in batch], batch))
    return len(read_journal(shard.journal))


def batches_of(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of samples in batches of similar length.

    The longest come first, so that what does not fit into memory fails at once. Padding depends on the batch, and so do the
    last bits of a result: the batches are the same for any number of workers.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _label_scorer(shard: EvaluationShard, prepared: PreparedDataset) -> Scorer:
    loaded = load_model(shard.base_folder, shard.adapter, shard.precision, prepared.head, seed=shard.seed)
    return partial(score_labels, loaded)


def _text_scorer(shard: EvaluationShard, prepared: PreparedDataset) -> Scorer:
    written = prepared.prompting
    own = Prompting.load(shard.adapter) if shard.adapter else written
    loaded = load_model(shard.base_folder, shard.adapter, shard.precision, prepared.head, own)

    def score(samples: Sequence[Any], indices: Sequence[int]) -> list[Record]:
        asked = [rewritten(sample, written, own, loaded.tokenizer) for sample in samples]
        return score_texts(loaded, asked, indices, shard.settings)

    return score


def rewritten(sample: Sample, written: Prompting, own: Prompting, tokenizer: Any) -> Sample:
    """A sample with its prompt in the form that an adapter was trained on.

    A champion of another prompt template would score badly on prompts in the new one, and be replaced for that alone.
    Conversations of several turns and plain text stay as they are.

    Args:
        sample: a prepared sample.
        written: the form it was prepared in.
        own: the form of the adapter.
        tokenizer: the base's.
    """
    if own == written:
        return sample
    if not sample["references"]:
        return sample
    answer = Message("assistant", sample["references"][0])
    as_written = written.encode(tokenizer, [Message("user", written.wrap(sample["prompt"])), answer])
    if as_written.input_ids != list(sample["input_ids"]):
        return sample
    ids, labels, prompt_tokens = own.encode(tokenizer, [Message("user", own.wrap(sample["prompt"])), answer])
    return {**sample, "input_ids": ids, "labels": labels, "prompt_tokens": prompt_tokens}
