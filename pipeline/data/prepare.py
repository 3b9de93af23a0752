"""The prepare stage: files in, two tokenised splits out.

    out/train, out/heldout   Hugging Face datasets on disk (columns: see `COLUMNS` and `LABELLED_COLUMNS`)
    out/validation           another one, where `data.validation_rows` asks for it
    out/calibration          another one, where `data.calibration` names a source
    out/prompting.json       how prompts are written (`pipeline.models.prompting`)
    out/head.json            what the outputs of a new head mean (`pipeline.models.heads`), where the recipe asks for one
    out/rejected.jsonl       every unusable row with its reason
    out/summary.json         counts; written last

The same rows give the same splits and token ids, in whatever files and order they come.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config.settings import DataSettings, HeadKind
from pipeline.core.errors import BaseModelError, DataError, WorkspaceError
from pipeline.data.forms import decide_form, read_samples
from pipeline.data.labels import Labels, check_sides, find_labels, label_summary
from pipeline.data.readers import read_rows
from pipeline.data.samples import Rejection, Sample
from pipeline.data.sources import DataSources, SourceFile
from pipeline.data.split import Split, split_samples
from pipeline.models.heads import Head
from pipeline.models.prompting import Message, Prompting, TemplateError, Tokenizer, encode_texts

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("input_ids", "labels", "prompt", "prompt_tokens", "references", "choices", "choice_labels", "source")
# `token_type_ids` is empty where the tokenizer has none.
LABELLED_COLUMNS = ("input_ids", "token_type_ids", "label", "prompt", "references", "source")
PROGRESS_EVERY_ROWS = 256
ROWS_PER_BATCH = 10_000
LOCATIONS_SHOWN = 5

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PreparedDataset:
    """What `prepare_dataset` made: its folder and summary; the splits are mapped from disk when first asked for."""

    folder: Path
    summary: dict[str, Any]

    @cached_property
    def train(self) -> Dataset:
        """The training split."""
        return self._load("train")

    @cached_property
    def heldout(self) -> Dataset:
        """The held-out split."""
        return self._load("heldout")

    @cached_property
    def validation(self) -> Dataset | None:
        """What training is watched by, if anything."""
        return self._load("validation") if (self.folder / "validation").exists() else None

    @cached_property
    def calibration(self) -> Dataset:
        """The text that truncation looks at: its own source, or the training split."""
        return self._load("calibration") if (self.folder / "calibration").exists() else self.train

    @cached_property
    def prompting(self) -> Prompting:
        """How the prompts were written."""
        return Prompting.load(self.folder)

    @cached_property
    def head(self) -> Head:
        """The head that the samples are for."""
        return Head.load(self.folder)

    def _load(self, name: str) -> Dataset:
        from datasets import load_from_disk

        try:
            return load_from_disk(str(self.folder / name))
        except (OSError, ValueError) as error:
            raise WorkspaceError(
                f"{self.folder / name} is damaged ({error}); delete {self.folder} and run again"
            ) from None


@dataclass(frozen=True)
class Tokenised:
    """A sample with its token ids; `labels` and `prompt_tokens` for a language model, the others for a new head."""

    sample: Sample
    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    prompt_tokens: int = 0
    token_type_ids: npt.NDArray[np.int32] | None = None
    label: float = 0.0

    @property
    def turns(self) -> tuple[Message, ...]:
        """The conversation."""
        return self.sample.turns

    @property
    def opening(self) -> str:
        """What must not occur in both splits."""
        return self.sample.opening


def load_prepared(folder: Path) -> PreparedDataset:
    """Open what `prepare_dataset` wrote.

    Raises:
        WorkspaceError: the folder is incomplete or damaged.
    """
    path = folder / "summary.json"
    try:
        return PreparedDataset(folder, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise WorkspaceError(f"{path} cannot be read ({error}); delete {folder} and run again") from None


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
        context_tokens: The longest sequence the base model takes.
        on_progress: Called now and then with the rows tokenised so far and the rows in all.
        head: What the samples are for.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        DataError: damaged files, more unusable rows than `max_rejected_share`, an empty split, contradictory settings.
        BaseModelError: the tokenizer cannot be loaded.
        WorkspaceError: `out` cannot be written.
    """
    if settings.max_tokens > context_tokens:
        raise DataError(
            f"data.max_tokens {settings.max_tokens} is more than the {context_tokens} tokens the base model takes; "
            f"set data.max_tokens to {context_tokens} or less"
        )
    tokenizer = load_tokenizer(tokenizer_folder)
    labelled = head != "language-model"
    if labelled:
        settings = settings.model_copy(update={"form": "labelled"})
    form, train, rejected = _read(sources.train, settings)
    if form == "labelled" and not labelled:
        raise DataError("texts with a label need a head to learn it; set base.head: classification or regression")
    same_form = settings.model_copy(update={"form": form})
    _, heldout, heldout_rejected = _read(sources.heldout, same_form)
    _, calibration, calibration_rejected = _read(sources.calibration, same_form)
    rejected += heldout_rejected + calibration_rejected
    rows_read = len(
        {item.location for item in itertools.chain[Sample | Rejection](train, heldout, calibration, rejected)}
    )
    _check_rejected(rejected, rows_read, settings)  # before the minutes that tokenising may take

    labels = find_labels(head, settings.labels, [*train, *heldout]) if labelled else None
    prompting = Prompting() if labelled else Prompting.from_settings(settings, tokenizer, form)
    tokenise = partial(_tokenise_labelled, labels) if labels else partial(_tokenise, prompting)
    sides: list[list[Tokenised]] = [[], [], []]
    done, total = 0, len(train) + len(heldout) + len(calibration)
    for side, samples in zip(sides, (train, heldout, calibration), strict=True):
        for sample in samples:
            result = tokenise(sample, tokenizer, settings.max_tokens)
            if isinstance(result, Rejection):
                rejected.append(result)
            else:
                side.append(result)
            done += 1
            if done % PROGRESS_EVERY_ROWS == 0 or done == total:
                on_progress(done, total)
    _check_rejected(rejected, rows_read, settings)

    split = split_samples(
        sides[0],
        sides[1] if sources.heldout else None,
        settings,
        partial(join_references, by_prompt=settings.group_references),
    )
    if settings.train_on_prompt:
        split = replace(split, train=[replace(row, labels=row.input_ids) for row in split.train])
    summary = _summary(split, rejected, rows_read, form)
    if labels:
        values = [row.label for row in split.train]
        check_sides(labels.head, values, [row.label for row in split.heldout])
        summary |= label_summary(labels.head, values)
    with _storing(out):
        _write_splits(split, sides[2], out, LABELLED_COLUMNS if labels else COLUMNS)
        prompting.save(out)
        if labels:
            labels.head.save(out)
        lines = [json.dumps({"source": row.location, "reason": row.reason}, ensure_ascii=False) for row in rejected]
        out.joinpath("rejected.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        out.joinpath("summary.json").write_text(text, encoding="utf-8")
    return summary


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a local Hugging Face folder; it never warns of long texts, since their length is checked here.

    Raises:
        BaseModelError: the folder holds no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its many tokenizer formats raise
        reason = " ".join(str(error).split())[:300]
        raise BaseModelError(
            f"no tokenizer can be loaded from {folder}: {reason}; copy the whole model folder"
        ) from None
    tokenizer.model_max_length = 10**30
    return tokenizer


def _read(files: Sequence[SourceFile], settings: DataSettings) -> tuple[str, list[Sample], list[Rejection]]:
    samples: list[Sample] = []
    rejected: list[Rejection] = []
    for file in files:
        rows = read_rows(file.path, settings.separator)
        head = [next(rows)]
        form = decide_form(settings, head[0].values, head[0].location)
        settings = settings.model_copy(update={"form": form})  # all files in one form
        for item in read_samples(itertools.chain(head, rows), settings, form):
            if isinstance(item, Sample):
                samples.append(item)
            else:
                rejected.append(item)
    return settings.form, samples, rejected


def _tokenise(prompting: Prompting, sample: Sample, tokenizer: Tokenizer, max_tokens: int) -> Tokenised | Rejection:
    turns = [Message(role, prompting.wrap(text) if role == "user" else text) for role, text in sample.turns]
    try:
        encoded = prompting.encode(tokenizer, turns)
        # Every choice is scored after the prompt.
        others = [
            prompting.encode(tokenizer, [*turns[:-1], Message("assistant", choice)])
            for choice in sample.choices
            if choice != turns[-1].content
        ]
    except TemplateError as error:
        return Rejection(sample.location, str(error))
    if max(len(each.input_ids) for each in (encoded, *others)) > max_tokens:
        return Rejection(sample.location, f"longer than data.max_tokens ({max_tokens})")
    ids, labels, prompt_tokens = encoded
    return Tokenised(sample, np.array(ids, np.int32), np.array(labels, np.int32), prompt_tokens)


def join_references(samples: Sequence[Tokenised], by_prompt: bool) -> list[Tokenised]:
    """One sample for those of one row, or `by_prompt` for all of one prompt: the first, with the references of all."""
    groups: dict[Any, list[Tokenised]] = {}
    for sample in samples:
        asked = sample.turns[:-1]
        place = None if by_prompt and asked else sample.sample.location
        groups.setdefault((asked, sample.sample.choices, place), []).append(sample)
    joined = []
    for first, *others in groups.values():
        further = tuple(other.turns[-1].content for other in others)
        joined.append(replace(first, sample=replace(first.sample, further=further)))
    return joined


def _tokenise_labelled(labels: Labels, sample: Sample, tokenizer: Tokenizer, max_tokens: int) -> Tokenised | Rejection:
    read = labels.read(sample)
    if isinstance(read, Rejection):
        return read
    encoded = encode_texts(tokenizer, [turn.content for turn in sample.turns[:-1]])
    ids, types = (np.array(encoded.get(name, ()), np.int32) for name in ("input_ids", "token_type_ids"))
    if len(ids) > max_tokens:
        return Rejection(sample.location, f"longer than data.max_tokens ({max_tokens})")
    sample, label = read
    return Tokenised(sample, ids, ids[:0], token_type_ids=types, label=label)


def _check_rejected(rejected: list[Rejection], rows_read: int, settings: DataSettings) -> None:
    if len(rejected) <= settings.max_rejected_share * rows_read:
        return
    reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(r.reason for r in rejected).most_common())
    first = ", ".join(row.location for row in rejected[:LOCATIONS_SHOWN])
    raise DataError(
        f"{len(rejected)} of {rows_read} rows ({len(rejected) / rows_read:.1%}) are unusable: {reasons}; first: "
        f"{first}. Mend them{_length_hint(rejected)} or raise data.max_rejected_share "
        f"(now {settings.max_rejected_share:g})"
    )


def _length_hint(rejected: list[Rejection]) -> str:
    return ", raise data.max_tokens" if any(row.reason.startswith("longer than") for row in rejected) else ""


def _summary(split: Split[Tokenised], rejected: list[Rejection], rows_read: int, form: str) -> dict[str, Any]:
    both = split.train + split.heldout + split.validation
    return {
        "form": form,
        "rows_read": rows_read,
        "rows_rejected": len(rejected),
        "rejected": dict(Counter(row.reason for row in rejected).most_common()),
        "rejected_first": [f"{row.location}: {row.reason}" for row in rejected[:LOCATIONS_SHOWN]],
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
    # In batches: one array of lists holds at most 2**31 tokens.
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


@contextmanager
def _storing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkspaceError(f"{out} cannot be written: {error}; free space or rights?") from None
