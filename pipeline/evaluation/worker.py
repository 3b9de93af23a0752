"""What each evaluation process does: load the model once, score its share of the held-out samples, journal each result.

An interrupted shard resumes where its journal ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.config.evaluate import EvaluateSettings
from pipeline.core.journal import JournalWriter, Record, read_journal
from pipeline.data.prepared import PreparedDataset, load_prepared
from pipeline.evaluation.scoring import score_labels, score_texts
from pipeline.models.language_model import Sample
from pipeline.models.prompting import Message, Prompting
from pipeline.serving.inference import load_model

# (samples, their numbers in the held-out split) -> a record per sample.
Scorer = Callable[[Sequence[Any], Sequence[int]], list[Record]]


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
