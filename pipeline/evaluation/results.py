"""The results that an evaluation keeps: per-sample records as parquet, and those of lm-evaluation-harness as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.journal import Record
from pipeline.metrics.intervals import Interval, mean_differences

HARNESS_JSON = "harness.json"


def write_samples(path: Path, records: Sequence[Record]) -> None:
    """Write records as parquet, one row each; a field that a record lacks is null in its row."""
    import pyarrow as pa
    import pyarrow.parquet

    fields = dict.fromkeys(field for record in records for field in record)
    table = pa.table({field: [record.get(field) for record in records] for field in fields})
    pyarrow.parquet.write_table(table, path)


def read_samples(path: Path) -> list[Record]:
    """Read records back as they were written."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path).to_pylist()
    return [{field: value for field, value in row.items() if value is not None} for row in rows]


@dataclass(frozen=True)
class HarnessResult:
    """One metric of one task for one candidate.

    Attributes:
        name: `TASK/METRIC`, or `TASK/METRIC/FILTER`.
        value: the metric over all documents.
        lower_is_better: which way the metric improves.
        per_sample: the metric of every document by its id; None unless `value` is their mean.
    """

    name: str
    value: float
    lower_is_better: bool
    per_sample: dict[str, float] | None


@dataclass(frozen=True)
class HarnessRow:
    """One metric of one task for all candidates.

    Attributes:
        name: `TASK/METRIC`, or `TASK/METRIC/FILTER`.
        lower_is_better: which way the metric improves.
        values: the metric of each candidate.
        differences: adapted - opponent on the same documents with its interval, by opponent; empty unless the task's value
            is a mean over documents.
    """

    name: str
    lower_is_better: bool
    values: dict[str, float]
    differences: dict[str, Interval]


def read_harness(folder: Path) -> list[HarnessResult]:
    """Read the harness results of an evaluation; empty where no task was run."""
    file = folder / HARNESS_JSON
    return [HarnessResult(**row) for row in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []


def harness_rows(candidates: Mapping[str, Sequence[HarnessResult]]) -> list[HarnessRow]:
    """Put the candidates' results side by side, and compare each with the candidate `adapted`."""
    found = {name: {result.name: result for result in results} for name, results in candidates.items()}
    rows = []
    for name, ours in found["adapted"].items():
        others = {candidate: results[name] for candidate, results in found.items() if name in results}
        rows.append(
            HarnessRow(
                name=name,
                lower_is_better=ours.lower_is_better,
                values={candidate: result.value for candidate, result in others.items()},
                differences={
                    candidate: mean_differences(ours.per_sample, result.per_sample)
                    for candidate, result in others.items()
                    if candidate != "adapted" and ours.per_sample and result.per_sample
                },
            )
        )
    return rows
