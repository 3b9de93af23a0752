"""What each evaluation process does: load the model once, score its share of the held-out samples, journal each result.

An interrupted shard goes on where its journal ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.evaluation.choices import (
    choices_of,
    continuation_ids,
    named_choice,
    right_choice,
    score_choices,
)
from pipeline.evaluation.labels import score_labels
from pipeline.evaluation.likelihoods import log_likelihoods
from pipeline.generation import Answerer, greedy_answers, load_answerer
from pipeline.journal import JournalWriter, Record, read_journal
from pipeline.language_model import Sample, collate, label_losses
from pipeline.prediction import load_predictor
from pipeline.prepare.stage import PreparedDataset, load_prepared
from pipeline.prompting import Message, Prompting
from pipeline.settings import EvaluateSettings

# Samples and their indices -> their results.
Scorer = Callable[[Sequence[Any], Sequence[int]], list[Record]]


@dataclass(frozen=True)
class EvaluationShard:
    """A share of one candidate's evaluation: the batches `index`, `index + count`, ... of the held-out samples.

    Attributes:
        base_folder, adapter: the candidate; the plain base where `adapter` is None.
        prepared: folder of the prepared data.
        seed: of an untrained head, where there is no adapter.
        journal: where results go.
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
    """Score the shard's samples that its journal lacks; returns how many it holds in the end."""
    torch.set_num_threads(1)
    prepared = load_prepared(shard.prepared)
    samples = prepared.heldout
    lengths = [len(ids) for ids in samples["input_ids"]]
    batches = batches_of(lengths, shard.settings.batch_size)[shard.index :: shard.count]
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
    """Samples of like length together, the longest first: what does not fit into memory fails at once.

    The batches are the same for any number of workers, and so, with them, is every last bit of the results.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _label_scorer(shard: EvaluationShard, prepared: PreparedDataset) -> Scorer:
    predictor = load_predictor(shard.base_folder, shard.adapter, shard.precision, prepared.head, shard.seed)
    return partial(score_labels, predictor)


def _text_scorer(shard: EvaluationShard, prepared: PreparedDataset) -> Scorer:
    written = prepared.prompting
    own = Prompting.load(shard.adapter) if shard.adapter else written
    answerer = load_answerer(shard.base_folder, shard.adapter, shard.precision, own)

    def score(samples: Sequence[Any], indices: Sequence[int]) -> list[Record]:
        asked = [rewritten(sample, written, own, answerer.tokenizer) for sample in samples]
        return _score(answerer, asked, indices, shard.settings)

    return score


def rewritten(sample: Sample, written: Prompting, own: Prompting, tokenizer: Any) -> Sample:
    """A sample of one prompt and its answer in the form an adapter was trained on.

    A champion of another prompt template would do badly on prompts in the new one, and be replaced for that alone.
    Longer conversations and plain text are taken as they are.
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


@torch.inference_mode()
def _score(
    answerer: Answerer, samples: Sequence[Sample], indices: Sequence[int], settings: EvaluateSettings
) -> list[Record]:
    losses, counts = _summed_losses(answerer.model, samples)
    records: list[Record] = [
        {"sample": index, "loss_sum": loss, "tokens": count, "references": list(sample["references"])}
        for index, loss, count, sample in zip(indices, losses, counts, samples, strict=True)
    ]
    if settings.kind == "choice":
        _add_choices(answerer, samples, records, settings)
    _add_outputs(answerer, samples, records, settings)
    return records


def _add_choices(
    answerer: Answerer, samples: Sequence[Sample], records: Sequence[Record], settings: EvaluateSettings
) -> None:
    options = [choices_of(sample, settings.choices)[0] for sample in samples]
    found = log_likelihoods(
        answerer.model,
        [_prompt(sample) for sample in samples],
        [
            [continuation_ids(answerer.prompting, answerer.tokenizer, sample["prompt"], choice) for choice in choices]
            for sample, choices in zip(samples, options, strict=True)
        ],
    )
    for record, choices, likelihoods in zip(records, options, found, strict=True):
        record.update(score_choices(likelihoods, choices, right_choice(record["references"], choices)))


def _add_outputs(
    answerer: Answerer, samples: Sequence[Sample], records: Sequence[Record], settings: EvaluateSettings
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
    outputs = greedy_answers(answerer.model, answerer.tokenizer, prompts, settings.max_new_tokens)
    for (sample, record), output in zip(shown, outputs, strict=True):
        record["output"] = output
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
