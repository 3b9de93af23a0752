"""Preparation of a dataset: read the source files, check and tokenise their rows, split them, and write the result.

`pipeline.data.prepared` describes the folder that is written. The same rows give the same splits and token ids, whatever the
files that hold them and whatever their order.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.settings import DataSettings, HeadKind
from pipeline.core.errors import WorkspaceError
from pipeline.data.first_rows import LOCATIONS_SHOWN, Rows, check_length, check_rejected, read_sides
from pipeline.data.labels import Labels, check_sides, find_labels, label_summary
from pipeline.data.prepared import COLUMNS, LABELLED_COLUMNS, Rejection, Sample
from pipeline.data.sources import DataSources
from pipeline.data.split import Split, split_samples
from pipeline.data.tokenised import Tokenised, tokenise_labelled, tokenise_text
from pipeline.models.prompting import Prompting, check_tokens, embedded_tokens, load_tokenizer

PROGRESS_EVERY_ROWS = 256
# One Arrow array of lists holds at most 2**31 tokens, so the rows are written in batches.
ROWS_PER_BATCH = 10_000

Progress = Callable[[int, int], None]


def prepare_dataset(
    settings: DataSettings,
    sources: DataSources,
    tokenizer_folder: Path,
    context_tokens: int,
    out: Path,
    on_progress: Progress,
    head: HeadKind = "language-model",
) -> dict[str, Any]:
    """Read, check, tokenise and split the data, and write the folder `out`.

    Args:
        context_tokens: The length of the longest sequence that the base model takes.
        on_progress: Called now and then with (rows tokenised so far, all rows).
        head: The head that the samples are for.

    Returns:
        The content of `summary.json`.

    Raises:
        DataError: A file is damaged, more rows than `max_rejected_share` are unusable, a split is empty, or settings
            contradict each other.
        BaseModelError: The tokenizer cannot be loaded.
        WorkspaceError: `out` cannot be written.
    """
    check_length(settings, context_tokens)
    tokenizer = load_tokenizer(tokenizer_folder)
    labelled = head != "language-model"
    rows, settings = read_sides(settings, sources, labelled)
    check_rejected(rows.rejected, rows.count, settings)  # before the minutes that tokenising may take
    labels = find_labels(head, settings.labels, [*rows.train, *rows.heldout]) if labelled else None
    prompting = Prompting() if labelled else Prompting.from_settings(settings, tokenizer, settings.form)
    tokenise = partial(tokenise_labelled, labels) if labels else partial(tokenise_text, prompting)
    train, heldout, calibration = _tokenise_sides(
        rows, lambda sample: tokenise(sample, tokenizer, settings.max_tokens), on_progress
    )
    check_rejected(rows.rejected, rows.count, settings)
    tokenised = itertools.chain(train, heldout, calibration)
    check_tokens(tokenizer, (sample.input_ids for sample in tokenised), embedded_tokens(tokenizer_folder))
    split = _split([train, heldout], settings, has_heldout=bool(sources.heldout))
    summary = _summary(split, rows, settings.form) | (_label_summary(labels, split) if labels else {})
    with _storing(out):
        _write_splits(split, calibration, out, LABELLED_COLUMNS if labels else COLUMNS)
        prompting.save(out)
        if labels:
            labels.head.save(out)
        _write_facts(out, rows.rejected, summary)
    return summary


def join_references(samples: Sequence[Tokenised], by_prompt: bool) -> list[Tokenised]:
    """Join samples that differ by their reference only: the first of each group, with the references of all.

    Args:
        by_prompt: Group all samples of one prompt; otherwise only those that come from one row.
    """
    groups: dict[Any, list[Tokenised]] = {}
    for sample in samples:
        asked = sample.turns[:-1]
        place = None if by_prompt and asked else sample.sample.location
        groups.setdefault((asked, sample.sample.choices, place), []).append(sample)
    joined = []
    for first, *others in groups.values():
        further = tuple(other.sample.written or other.turns[-1].content for other in others)
        joined.append(replace(first, sample=replace(first.sample, further=further)))
    return joined


def _tokenise_sides(
    rows: Rows, tokenise: Callable[[Sample], list[Tokenised] | Rejection], on_progress: Progress
) -> list[list[Tokenised]]:
    """The tokenised rows of each side. Rows that turn out unusable are added to the rejected ones."""
    sides: list[list[Tokenised]] = [[], [], []]
    done, total = 0, len(rows.train) + len(rows.heldout) + len(rows.calibration)
    for side, samples in zip(sides, (rows.train, rows.heldout, rows.calibration), strict=True):
        for sample in samples:
            result = tokenise(sample)
            if isinstance(result, Rejection):
                rows.rejected.append(result)
            else:
                side.extend(result)
            done += 1
            if done % PROGRESS_EVERY_ROWS == 0 or done == total:
                on_progress(done, total)
    return sides


def _split(sides: list[list[Tokenised]], settings: DataSettings, has_heldout: bool) -> Split[Tokenised]:
    join = partial(join_references, by_prompt=settings.group_references)
    split = split_samples(sides[0], sides[1] if has_heldout else None, settings, join)
    if settings.train_on_prompt:
        split = replace(split, train=[replace(row, labels=row.input_ids) for row in split.train])
    return split


def _label_summary(labels: Labels, split: Split[Tokenised]) -> dict[str, Any]:
    values = [row.label for row in split.train]
    check_sides(labels.head, values, [row.label for row in split.heldout])
    return label_summary(labels.head, values)


def _summary(split: Split[Tokenised], rows: Rows, form: str) -> dict[str, Any]:
    rejected = rows.rejected
    both = split.train + split.heldout + split.validation
    return {
        "form": form,
        "rows_read": rows.count,
        "rows_rejected": len(rejected),
        "rejected": dict(Counter(row.reason for row in rejected).most_common()),
        "rejected_first": [f"{row.location}: {row.reason}" for row in rejected[:LOCATIONS_SHOWN]],
        "unread": dict(sorted(rows.unread.items())),
        "duplicates_removed": split.duplicates,
        "leaked_removed": split.leaked,
        "rows_kept": len(both),
        "train_rows": len(split.train),
        "heldout_rows": len(split.heldout),
        "validation_rows": len(split.validation),
        "heldout_prompts": len({row.opening for row in split.heldout}),
        "heldout_references": sum(len(row.sample.references) for row in split.heldout),
        "train_tokens": sum(len(row.input_ids) for row in split.train),
        "train_labelled_tokens": sum(int((row.labels >= 0).sum()) for row in split.train),
        "heldout_tokens": sum(len(row.input_ids) for row in split.heldout),
        "longest_tokens": max(len(row.input_ids) for row in both),
    }


def _write_splits(split: Split[Tokenised], calibration: list[Tokenised], out: Path, columns: Sequence[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    _write_split(split.train, out / "train", columns)
    _write_split(split.heldout, out / "heldout", columns)
    if split.validation:
        _write_split(split.validation, out / "validation", columns)
    if calibration:
        _write_split(calibration, out / "calibration", columns)


def _write_split(rows: list[Tokenised], folder: Path, columns: Sequence[str]) -> None:
    import datasets
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    texts = pa.list_(pa.string())
    types = {"input_ids": ids, "labels": ids, "token_type_ids": ids, "prompt_tokens": pa.int32(), "label": pa.float64()}
    types |= dict.fromkeys(("references", "choices", "choice_labels"), texts)
    schema = pa.schema([(name, types.get(name, pa.string())) for name in columns])
    batches = [_batch(rows[start : start + ROWS_PER_BATCH], schema) for start in range(0, len(rows), ROWS_PER_BATCH)]
    table = datasets.Dataset(pa.Table.from_batches(batches, schema))
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        table.save_to_disk(str(folder))
    finally:
        if not bars:
            datasets.enable_progress_bars()


_CELLS: dict[str, Callable[[Tokenised], Any]] = {
    "input_ids": lambda row: row.input_ids,
    "labels": lambda row: row.labels,
    "token_type_ids": lambda row: [] if row.token_type_ids is None else row.token_type_ids,
    "label": lambda row: row.label,
    "prompt": lambda row: row.sample.prompt,
    "prompt_tokens": lambda row: row.prompt_tokens,
    "references": lambda row: row.sample.references,
    "choices": lambda row: row.sample.choices,
    "choice_labels": lambda row: row.sample.labels,
    "source": lambda row: row.sample.location,
}


def _batch(rows: list[Tokenised], schema: Any) -> Any:
    import pyarrow as pa

    arrays = [pa.array([_CELLS[field.name](row) for row in rows], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _write_facts(out: Path, rejected: list[Rejection], summary: dict[str, Any]) -> None:
    lines = [json.dumps({"source": row.location, "reason": row.reason}, ensure_ascii=False) for row in rejected]
    out.joinpath("rejected.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    out.joinpath("summary.json").write_text(text, encoding="utf-8")


@contextmanager
def _storing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkspaceError(f"{out} cannot be written: {error}; free space or rights?") from None
