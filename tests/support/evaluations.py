"""Evaluations of a plain base on given rows, without Ray, and the same multiple choice by lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kasa.files import file_digest
from pipeline.config.settings import DataSettings, EvaluateSettings
from pipeline.core.files import Record, read_journal
from pipeline.data.prepare import prepare_dataset
from pipeline.data.prepared import load_prepared
from pipeline.data.sources import DataSources, SourceFile
from pipeline.evaluation.worker import EvaluationShard, evaluate_shard
from pipeline.metrics.intervals import measure

MAX_TOKENS = 512
Rows = list[dict[str, Any]]


def prepare_rows(base: Path, rows: Rows, folder: Path, **settings: Any) -> Path:
    """Prepare a dataset whose held-out split are these rows; its training split has one row."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "heldout.jsonl", rows)
    asked = next(field for field in ("question", "instruction", "prompt") if field in rows[0])
    _write(folder / "train.jsonl", [{**rows[0], asked: f"{rows[0][asked]} (again)"}])
    paths = [folder / f"{side}.jsonl" for side in ("train", "heldout")]
    train, heldout = ((SourceFile(path, file_digest(path)),) for path in paths)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    longest = min(MAX_TOKENS, int(config["max_position_embeddings"]))
    data = DataSettings(train=["train.jsonl"], max_tokens=longest, chat_template=False, **settings)
    prepared = folder / "prepared"
    prepare_dataset(data, DataSources(train, heldout, ()), base, longest, prepared, lambda done, total: None)
    return prepared


def shards_of(
    base: Path, prepared: Path, settings: EvaluateSettings, count: int, folder: Path
) -> list[EvaluationShard]:
    """Return the shards of an evaluation of the plain base in fp32; their journals lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        EvaluationShard(base, None, prepared, "fp32", settings, index, count, folder / f"{index}.jsonl")
        for index in range(count)
    ]


def results_of(shards: Sequence[EvaluationShard]) -> list[Record]:
    """Return what evaluated shards found, in the order of the samples."""
    records = [record for shard in shards for record in read_journal(shard.journal)]
    return sorted(records, key=lambda record: record["sample"])


def against_harness(base: Path, rows: Rows, template: str, folder: Path) -> dict[str, Any]:
    """Score multiple-choice rows here and by lm-evaluation-harness.

    Returns:
        `samples`; `ours` and `harness`, the accuracies; `largest_difference` of a log-likelihood, in nats.
    """
    prepared = prepare_rows(base, rows, folder, prompt_template=template)
    settings = EvaluateSettings(kind="choice", samples_shown=0)
    (shard,) = shards_of(base, prepared, settings, 1, folder / "ours")
    evaluate_shard(shard)
    ours = results_of([shard])
    asked = [
        {
            "text": template.replace("{prompt}", sample["prompt"]).rstrip(),
            "choices": sample["choices"],
            "right": sample["choices"].index(sample["references"][0]),
        }
        for sample in load_prepared(prepared).heldout
    ]
    theirs = _harness(base, asked, folder)
    found = measure(ours, settings.measured)
    differences = [
        abs(mine - other)
        for record, others in zip(ours, theirs["log_likelihoods"], strict=True)
        for mine, other in zip(record["log_likelihoods"], others, strict=True)
    ]
    return {
        "samples": len(ours),
        "largest_difference": max(differences),
        "ours": {name: found[name].estimate for name in ("accuracy", "accuracy_norm")},
        "harness": {"accuracy": theirs["acc"], "accuracy_norm": theirs["acc_norm"]},
    }


def _harness(base: Path, asked: Rows, folder: Path) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    file = folder / "asked.jsonl"
    _write(file, asked)
    task = {
        "task": "kasa_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    model = HFLM(pretrained=str(base), device="cpu", dtype="float32", batch_size=8)
    # To read the thousands of tasks that come with it takes eight seconds.
    none_known = TaskManager(include_defaults=False)
    found: Any = simple_evaluate(model, tasks=[task], task_manager=none_known, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"]["kasa_choices"], key=lambda sample: sample["doc_id"])
    return {
        "log_likelihoods": [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples],
        "acc": float(found["results"]["kasa_choices"]["acc,none"]),
        "acc_norm": float(found["results"]["kasa_choices"]["acc_norm,none"]),
    }


def _write(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
