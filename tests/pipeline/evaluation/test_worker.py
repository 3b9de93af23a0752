"""A shard of an evaluation: the same numbers for any number of workers and after any interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.settings import EvaluateSettings
from pipeline.core.files import Record, append_journal, read_journal
from pipeline.evaluation.results import read_samples, write_samples
from pipeline.evaluation.worker import EvaluationShard, batches_of, evaluate_shard
from pipeline.metrics.intervals import measure
from pipeline.serving.inference import LoadedModel

QUESTIONS = [
    {"question": f"count {n} from {n * n}", "choices": [f"{n} done", "from", f"count {n}"], "answer": n % 3} for n in range(10)
]  # fmt: skip


def evaluated(base: Path, prepared: Path, journals: Path, settings: EvaluateSettings, count: int = 1) -> list[Record]:
    journals.mkdir(exist_ok=True)
    records: list[Record] = []
    for index in range(count):
        shard = EvaluationShard(base, None, prepared, "fp32", settings, index, count, journals / f"{index}.jsonl")
        held = evaluate_shard(shard)
        found = read_journal(shard.journal)
        assert held == len(found)
        records += found
    return sorted(records, key=lambda record: record["sample"])


@pytest.mark.parametrize(
    "settings",
    [
        EvaluateSettings(kind="choice", extract=True, batch_size=3, max_new_tokens=3),
        EvaluateSettings(kind="text", batch_size=3, max_new_tokens=3),
        EvaluateSettings(kind="loss", batch_size=3, samples_shown=0),
    ],
    ids=lambda settings: settings.kind,
)
def test_two_workers_find_the_same_to_the_last_bit(
    base: Path, prepared: Callable[..., Path], tmp_path: Path, settings: EvaluateSettings
) -> None:
    data = prepared(QUESTIONS)
    one = evaluated(base, data, tmp_path / "one", settings)
    assert [record["sample"] for record in one] == list(range(len(QUESTIONS)))
    assert evaluated(base, data, tmp_path / "two", settings, count=2) == one
    found = measure(one, settings.measured)
    assert set(found) == set(settings.measured)
    if settings.kind == "choice":
        assert all(len(record["log_likelihoods"]) == 3 for record in one)
        right = [record["choice"] == record["references"][0] for record in one]
        assert found["accuracy"].estimate == sum(right) / len(right)


def test_the_same_choices_for_all_samples_are_those_of_each(
    base: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    choices = ["yes", "no", "done"]
    own = [{"question": f"count {n}", "choices": choices, "answer": choices[n % 3]} for n in range(6)]
    given = [{"prompt": row["question"], "completion": row["answer"]} for row in own]
    ours = evaluated(base, prepared(own), tmp_path / "own", EvaluateSettings(kind="choice", samples_shown=0))
    fixed = EvaluateSettings(kind="choice", choices=choices, samples_shown=0)
    assert evaluated(base, prepared(given), tmp_path / "given", fixed) == ours


def test_a_batch_torn_by_a_crash_is_scored_anew(base: Path, prepared: Callable[..., Path], tmp_path: Path) -> None:
    settings = EvaluateSettings(kind="choice", batch_size=4, samples_shown=0)
    data = prepared(QUESTIONS)
    whole = evaluated(base, data, tmp_path / "whole", settings)
    torn = tmp_path / "torn"
    torn.mkdir()
    kept = [record | {"loss_sum": -1.0} for record in read_journal(tmp_path / "whole" / "0.jsonl")[:6]]
    append_journal(torn / "0.jsonl", kept)
    again = evaluated(base, data, torn, settings)
    marked = {record["sample"] for record in again if record["loss_sum"] == -1.0}
    assert marked == {record["sample"] for record in kept[:4]}
    assert [record for record in again if record["sample"] not in marked] == [
        record for record in whole if record["sample"] not in marked
    ]


def test_batches_hold_samples_of_like_length_the_longest_first() -> None:
    assert batches_of([3, 9, 4, 9, 1], 2) == [[1, 3], [2, 0], [4]]


def test_results_come_back_from_parquet_as_they_were(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"sample": 0, "references": ["a", "b"], "loss_sum": 1.5, "log_likelihoods": [-1.0, -2.5]},
        {"sample": 1, "references": [], "loss_sum": 2.0, "output": "ü"},
    ]
    write_samples(tmp_path / "samples.parquet", records)
    assert read_samples(tmp_path / "samples.parquet") == records


def test_what_follows_the_reasoning_is_judged(
    base: Path, prepared: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "<think>\nIs it 4, or 5? Not </think> yet.\n</think>\n\n5"
    monkeypatch.setattr(LoadedModel, "generate", lambda self, prompts, tokens: [said] * len(prompts))
    settings = EvaluateSettings(kind="answer", max_new_tokens=3)
    rows = [{"prompt": "2 + 3?", "completion": "5"}, {"prompt": "2 + 2?", "completion": "4"}]
    found = evaluated(base, prepared(rows), tmp_path / "journals", settings)
    assert {(record["references"][0].strip(), record["output"], record["exact_match"]) for record in found} == {
        ("5", "5", 1.0),
        ("4", "5", 0.0),
    }
