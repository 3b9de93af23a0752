"""What each evaluation process does: load the model once, score its share of the held-out samples, journal each result.

An interrupted shard goes on where its journal ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.generation import Answerer, greedy_answers, load_answerer
from pipeline.journal import JournalWriter, Record, read_journal
from pipeline.language_model import Sample, collate, label_losses
from pipeline.prepare.stage import load_prepared
from pipeline.prompting import Message, Prompting
from pipeline.settings import EvaluateSettings


@dataclass(frozen=True)
class EvaluationShard:
    """A share of one candidate's evaluation: the held-out samples `index`, `index + count`, ...

    Attributes:
        base_folder, adapter: the candidate; the plain base where `adapter` is None.
        prepared: folder of the prepared data.
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


def evaluate_shard(shard: EvaluationShard) -> int:
    """Score the shard's samples that its journal lacks; returns how many it holds in the end."""
    torch.set_num_threads(1)
    samples = load_prepared(shard.prepared).heldout
    journal = JournalWriter(shard.journal, keep=lambda record: True)
    done = {record["sample"] for record in journal.kept}
    mine = [index for index in range(shard.index, len(samples), shard.count) if index not in done]
    if mine:
        written = load_prepared(shard.prepared).prompting
        own = Prompting.load(shard.adapter) if shard.adapter else written
        answerer = load_answerer(shard.base_folder, shard.adapter, shard.precision, own)
        # Longest first: what does not fit into memory fails at once.
        mine.sort(key=lambda index: -len(samples[index]["input_ids"]))
        for start in range(0, len(mine), shard.settings.batch_size):
            chosen = mine[start : start + shard.settings.batch_size]
            asked = [rewritten(samples[i], written, own, answerer.tokenizer) for i in chosen]
            journal.append(_score(answerer, asked, chosen, shard.settings))
    return len(read_journal(shard.journal))


def rewritten(sample: Sample, written: Prompting, own: Prompting, tokenizer: Any) -> Sample:
    """A sample of one prompt and its answer in the form an adapter was trained on.

    A champion of another prompt template would do badly on prompts in the new one, and be replaced for that alone.
    Longer conversations and plain text are taken as they are.
    """
    if own == written:
        return sample
    answer = Message("assistant", sample["reference"])
    as_written = written.encode(tokenizer, [Message("user", written.wrap(sample["prompt"])), answer])
    if as_written.input_ids != list(sample["input_ids"]):
        return sample
    ids, labels, prompt_tokens = own.encode(tokenizer, [Message("user", own.wrap(sample["prompt"])), answer])
    return {**sample, "input_ids": ids, "labels": labels, "prompt_tokens": prompt_tokens}


@torch.inference_mode()
def _score(
    answerer: Answerer, samples: Sequence[Any], indices: Sequence[int], settings: EvaluateSettings
) -> list[Record]:
    losses, counts = _summed_losses(answerer.model, samples)
    records: list[Record] = [
        {"sample": index, "loss_sum": loss, "tokens": count, "references": [sample["reference"]]}
        for index, loss, count, sample in zip(indices, losses, counts, samples, strict=True)
    ]
    if settings.choices:
        for record, choice in zip(records, _likeliest_choices(answerer, samples, settings.choices), strict=True):
            record["choice"] = choice
            record["accuracy"] = float(choice == record["references"][0].strip())
    _add_outputs(answerer, samples, records, settings)
    return records


def _wants_output(settings: EvaluateSettings) -> bool:
    return not settings.choices


def _add_outputs(
    answerer: Answerer, samples: Sequence[Any], records: Sequence[Record], settings: EvaluateSettings
) -> None:
    """Generate for all samples where the metric needs it, else for those that the report shows."""
    shown = [
        (sample, record)
        for sample, record in zip(samples, records, strict=True)
        if sample["prompt_tokens"] and (_wants_output(settings) or record["sample"] < settings.samples_shown)
    ]
    if not shown:
        return
    prompts = [sample["input_ids"][: sample["prompt_tokens"]] for sample, _ in shown]
    outputs = greedy_answers(answerer.model, answerer.tokenizer, prompts, settings.max_new_tokens)
    for (_, record), output in zip(shown, outputs, strict=True):
        record["output"] = output
        if not settings.choices:
            record["exact_match"] = float(output in [reference.strip() for reference in record["references"]])


def _summed_losses(model: nn.Module, samples: Sequence[Any]) -> tuple[list[float], list[int]]:
    batch = collate(samples).to(next(model.parameters()).device)
    losses_BK = label_losses(model, batch)
    return losses_BK.sum(dim=1).tolist(), (batch.labels_BK >= 0).sum(dim=1).tolist()


def _likeliest_choices(answerer: Answerer, samples: Sequence[Any], choices: Sequence[str]) -> list[str]:
    """For each sample, the choice whose tokens after the prompt, EOS included, are the likeliest in sum."""
    options = []
    for sample in samples:
        prompt = list(sample["input_ids"][: sample["prompt_tokens"]])
        for choice in choices:
            answer = answerer.prompting.answer_ids(answerer.tokenizer, sample["prompt"], choice)
            options.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    losses, _ = _summed_losses(answerer.model, options)
    count = len(choices)
    return [choices[min(range(count), key=lambda option: losses[row * count + option])] for row in range(len(samples))]
