"""Per-sample results as a parquet file: one row a sample, whatever its evaluator found out about it.

What lm-evaluation-harness found out about the candidates, side by side.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kasa.errors import nearest
from pipeline.config.settings import EvaluateSettings, HarnessSettings
from pipeline.core.errors import RecipeError
from pipeline.core.journal import Record
from pipeline.metrics.intervals import Interval, mean_differences


def write_samples(path: Path, records: Sequence[Record]) -> None:
    """Write results; a field that a record lacks is null in its row."""
    import pyarrow as pa
    import pyarrow.parquet

    fields = dict.fromkeys(field for record in records for field in record)
    table = pa.table({field: [record.get(field) for record in records] for field in fields})
    pyarrow.parquet.write_table(table, path)


def read_samples(path: Path) -> list[Record]:
    """The results as they were written."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path).to_pylist()
    return [{field: value for field, value in row.items() if value is not None} for row in rows]


HARNESS_JSON = "harness.json"


@dataclass(frozen=True)
class HarnessResult:
    """One metric of one task for one candidate.

    Attributes:
        name: `TASK/METRIC`, or `TASK/METRIC/FILTER`.
        per_sample: the metric of every document by its id, where `value` is their mean.
    """

    name: str
    value: float
    lower_is_better: bool
    per_sample: dict[str, float] | None


@dataclass(frozen=True)
class HarnessRow:
    """One metric of one task for all candidates.

    Attributes:
        values: by candidate.
        differences: by opponent, adapted - opponent on the same documents, with interval; none where the task's value is no
            mean over documents.
    """

    name: str
    lower_is_better: bool
    values: dict[str, float]
    differences: dict[str, Interval]


def check_harness(evaluate: EvaluateSettings, head: str) -> None:
    """Whether the tasks can be run here; training should not run for nothing.

    Raises:
        RecipeError: the harness is not installed, has no such task, or the model is none that answers in words.
    """
    settings = evaluate.harness
    if not settings.tasks:
        return
    if head != "language-model":
        raise RecipeError(f"evaluate.harness: lm-evaluation-harness asks language models, and base.head is {head}")
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(
            "evaluate.harness needs lm-evaluation-harness: pip install 'kasa-pipeline[harness]'; or leave it out"
        )
    if settings.include is not None and not Path(settings.include).is_dir():
        raise RecipeError(f"evaluate.harness.include: {settings.include} is no folder")
    _check_names(settings)


def read_harness(folder: Path) -> list[HarnessResult]:
    """What an evaluation's artifact holds of the harness."""
    file = folder / HARNESS_JSON
    return [HarnessResult(**row) for row in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []


def harness_rows(candidates: Mapping[str, Sequence[HarnessResult]]) -> list[HarnessRow]:
    """The candidates' results side by side; one of them is called `adapted`."""
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


def harness_tasks(settings: HarnessSettings) -> Any:
    """The harness's index of tasks: of the included folder alone where all that are asked for are single tasks in it.

    To read the thousands that come with the harness takes eight seconds. Only groups and tags can refer to them.
    """
    from lm_eval.tasks import TaskManager

    if settings.include:
        own: Any = TaskManager(include_path=settings.include, include_defaults=False)
        if set(settings.tasks) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=settings.include)


def _check_names(settings: HarnessSettings) -> None:
    known = harness_tasks(settings)
    for task in settings.tasks:
        if not known.match_tasks([task]):
            raise RecipeError(
                f"evaluate.harness.tasks: lm-evaluation-harness has no task {task!r}{nearest(task, known.all_tasks)}; "
                "`lm_eval ls tasks` lists them, and evaluate.harness.include names a folder of your own"
            )
