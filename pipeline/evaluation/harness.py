"""What a worker does with a task of lm-evaluation-harness (the extra `harness`): run it on one candidate.

The task's results are read back by `pipeline.evaluation.results`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.settings import HarnessSettings
from pipeline.core.files import atomic_write
from pipeline.evaluation.results import harness_tasks
from pipeline.models.prompting import LANGUAGE_MODEL, Prompting
from pipeline.serving.inference import load_model


@dataclass(frozen=True)
class HarnessJob:
    """One task, or group of tasks, on one candidate.

    Attributes:
        base_folder: the base model of the candidate.
        adapter: its adapter; None for the plain base.
        precision: `fp32` or `bf16`.
        task: the name of the task or group.
        settings: the recipe's `evaluate.harness` section.
        batch_size: requests per forward pass.
        out: the JSON file to write: a list of the fields of `HarnessResult`.
    """

    base_folder: Path
    adapter: Path | None
    precision: str
    task: str
    settings: HarnessSettings
    batch_size: int
    out: Path


def run_harness(job: HarnessJob) -> None:
    """Evaluate the task with the harness's own prompts, without a chat template, and write `out`."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    # The harness asks through the tokenizer alone, so the adapter's own prompting is left out.
    loaded = load_model(job.base_folder, job.adapter, job.precision, LANGUAGE_MODEL, Prompting())
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=job.batch_size)
    found: Any = simple_evaluate(
        model,
        tasks=[job.task],
        task_manager=harness_tasks(job.settings),
        limit=job.settings.limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    rows = [
        {
            "name": name,
            "value": float(value),
            "lower_is_better": not found["higher_is_better"].get(task, {}).get(metric, True),
            "per_sample": _per_sample(found["samples"].get(task, ()), metric, filtered, float(value)),
        }
        for task, values in found["results"].items()
        for name, metric, filtered, value in _named(task, values)
    ]
    atomic_write(job.out, json.dumps(rows))


def _named(task: str, values: Mapping[str, Any]) -> Iterable[tuple[str, str, str, Any]]:
    """The name (`TASK/METRIC`, with `/FILTER` unless that is `none`), metric, filter and value of each result."""
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, Real):
            yield f"{task}/{metric}" + ("" if filtered == "none" else f"/{filtered}"), metric, filtered, value


def _per_sample(
    samples: Iterable[Mapping[str, Any]], metric: str, filtered: str, value: float
) -> dict[str, float] | None:
    """The metric of every document by its id; None unless the task's value is their mean."""
    found = {
        str(sample["doc_id"]): sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample
    }
    if not found or not all(isinstance(one, Real) for one in found.values()):
        return None
    numbers = {document: float(one) for document, one in found.items()}
    return numbers if np.isclose(np.mean(list(numbers.values())), value, rtol=1e-9, atol=1e-12) else None
