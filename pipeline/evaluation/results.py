"""The driver's side of an evaluation: what is checked before training, and the results that are kept.

Results are records per sample as parquet, and those of lm-evaluation-harness as JSON. The rules of multiple choice are here
because the check before training and the scoring share them. A choice's log-likelihood is the sum over its own tokens. As in
lm-evaluation-harness, the end of the answer (EOS) does not count: a base model that would continue after the right word has
still chosen it.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kasa.errors import nearest
from kasa.files import read_json
from pipeline.config.settings import EvaluateSettings, HarnessSettings
from pipeline.core.errors import RecipeError, WorkspaceError, one_line
from pipeline.core.files import Record
from pipeline.metrics.intervals import Interval, mean_differences
from pipeline.models.prompting import Prompting

HARNESS_JSON = "harness.json"
_REASONING_END = "</think>"


def choices_of(sample: Mapping[str, Any], given: Sequence[str]) -> tuple[list[str], list[str]]:
    """(choices, labels) of a sample: those `given` for all samples, or its own where none are given."""
    return (list(given), list(given)) if given else (list(sample["choices"]), list(sample["choice_labels"]))


def right_choice(references: Sequence[str], choices: Sequence[str]) -> int | None:
    """The index of the first reference among the choices; None where it is not among them."""
    said = references[0].strip() if references else ""
    return next((place for place, choice in enumerate(choices) if choice.strip() == said), None)


def score_choices(log_likelihoods: Sequence[float], choices: Sequence[str], right: int | None) -> dict[str, Any]:
    """Score the choices of a sample.

    Args:
        log_likelihoods: of each choice, in nats.
        choices: their texts.
        right: index of the right one; None where no choice is right.

    Returns:
        The likeliest `choice`, whether it is right (`accuracy`, the harness's `acc`), and whether the one of the largest
        log-likelihood per character is right (`accuracy_norm`, the harness's `acc_norm`).
    """
    import numpy as np  # a retraining with nothing to do imports this module

    likeliest = int(np.argmax(log_likelihoods))
    by_length = int(np.argmax(np.array(log_likelihoods) / [len(choice) for choice in choices]))
    return {
        "choices": list(choices),
        "log_likelihoods": list(log_likelihoods),
        "choice": choices[likeliest],
        "accuracy": float(likeliest == right),
        "accuracy_norm": float(by_length == right),
    }


def named_choice(output: str, labels: Sequence[str]) -> int | None:
    """The index of the choice whose label comes first in a generated answer; None where none is named.

    This is how LLM-Adapters reads `the correct answer is answer3`. Case matters, a label must be a word of its own, and of
    labels that start at one position the longest counts.
    """
    pattern = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    found = re.search(rf"(?<!\w)(?:{pattern})(?!\w)", output)
    return labels.index(found[0]) if found else None


def without_reasoning(output: str, references: Sequence[str]) -> str:
    """A generated answer from the end of its reasoning on: what stands after the last `</think>`.

    Where a reference holds reasoning itself, or the answer ran out of tokens before it was closed, all of it counts.
    """
    if any(_REASONING_END in reference for reference in references):
        return output
    return output.rpartition(_REASONING_END)[2].strip() if _REASONING_END in output else output


def continuation_ids(prompting: Prompting, tokenizer: Any, prompt: str, choice: str) -> list[int]:
    """A choice's token ids after the prompt, without EOS."""
    ids = prompting.answer_ids(tokenizer, prompt, choice)
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def check_suitable(settings: EvaluateSettings, heldout: Iterable[Mapping[str, Any]], form: str) -> None:
    """Check that the held-out samples have what the evaluation needs.

    Args:
        heldout: the `references`, `choices`, `choice_labels` and `source` of each.
        form: the form of the data.

    Raises:
        RecipeError: the samples are plain text without a prompt, have no choices, or an answer that is none of them.
    """
    if settings.kind in ("loss", "classification", "regression"):
        return
    for sample in heldout:
        if not sample["references"]:
            raise RecipeError(
                f"evaluate.kind: {settings.kind} needs prompts with answers, but {sample['source']} is plain text (data of "
                f"form {form}); set evaluate.kind: loss, which measures loss and perplexity"
            )
        if settings.kind != "choice":
            continue
        choices, _ = choices_of(sample, settings.choices)
        if not choices:
            raise RecipeError(
                f"evaluate.kind: choice needs choices, but {sample['source']} (data of form {form}) has none; name them in "
                "evaluate.choices, or use data of form multiple-choice or llm-adapters"
            )
        if right_choice(sample["references"], choices) is None:
            raise RecipeError(
                f"evaluate.choices: the answer {sample['references'][0]!r} of {sample['source']} is none of "
                f"{', '.join(choices)}"
            )


def check_harness(evaluate: EvaluateSettings, head: str) -> None:
    """Check that the tasks of lm-evaluation-harness can be run here.

    Raises:
        RecipeError: the harness is not installed, has no such task, or the model is no language model.
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


def harness_tasks(settings: HarnessSettings) -> Any:
    """The harness's index of tasks: of the included folder alone where it has all that are asked for as single tasks.

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


def write_samples(path: Path, records: Sequence[Record]) -> None:
    """Write records as parquet, one row each; a field that a record lacks is null in its row."""
    import pyarrow as pa
    import pyarrow.parquet

    fields = dict.fromkeys(field for record in records for field in record)
    table = pa.table({field: [record.get(field) for record in records] for field in fields})
    pyarrow.parquet.write_table(table, path)


def read_samples(path: Path) -> list[Record]:
    """Read records back as they were written.

    Raises:
        WorkspaceError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise WorkspaceError(f"{path} is damaged: {one_line(error)}; run the same command again") from None
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
    return [HarnessResult(**row) for row in read_json(file, list)] if file.exists() else []


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
