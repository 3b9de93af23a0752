"""Two tiny tasks for lm-evaluation-harness, whose data are a file."""

from __future__ import annotations

import json
from pathlib import Path

TASKS = {
    "counting": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": name, "higher_is_better": True} for name in ("acc", "acc_norm")],
    },
    "reading": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity", "higher_is_better": False}],
    },
}


def write_harness_tasks(folder: Path) -> Path:
    """Write `counting`, eight questions, and `reading`, the perplexity of the same; returns the folder."""
    folder.mkdir()
    rows = [{"question": f"count {n} from", "choices": [f" {n}", " done"], "answer": n % 2} for n in range(8)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data.resolve())}}}
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **source, **task}))
    return folder
