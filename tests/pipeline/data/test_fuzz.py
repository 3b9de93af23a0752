"""Whatever is in a data file, its rows are samples or rejected, or there is one error that a user can read."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from kasa.errors import KasaError
from pipeline.config.settings import DataSettings
from pipeline.data.first_rows import check_first_rows
from pipeline.data.prepare import prepare_dataset
from pipeline.data.prepared import load_prepared
from pipeline.data.readers import FORMATS
from pipeline.data.sources import DataSources, SourceFile

# `NUMBER` differs from row to row, and `CLASS` is one of two.
ASKED, ANSWERED = {"role": "user", "content": "NUMBER?"}, {"role": "assistant", "content": "4", "weight": 1}
ROWS: list[dict[str, Any]] = [
    {"prompt": "p NUMBER", "completion": "c", "references": ["c", "d"], "system": "s"},
    {"instruction": "i NUMBER", "input": "x", "output": "o", "system": "s", "history": [["a", "b"]]},
    {
        "instruction": "NUMBER Option1: x Option2: y Answer format: option1/option2",
        "input": "",
        "output": "the correct answer is option2",
        "answer": "option2",
    },
    {"question": "q NUMBER", "choices": ["x", "y"], "answer": "1"},
    {"question": "q NUMBER", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    {"messages": [{"role": "developer", "content": [{"type": "text", "text": "b"}]}, ASKED, ANSWERED]},
    {"messages": [ASKED, {**ANSWERED, "weight": 0}, ASKED, ANSWERED]},
    {
        "conversations": [{"from": "human", "value": "NUMBER"}, {"from": "gpt", "value": "a"}],
        "system": "s",
        "tools": None,
    },
    {"text": "plain NUMBER text"},
    {"meaning_representation": "m NUMBER", "human_reference": "r"},
    {"text": "one NUMBER", "text_pair": "two", "label": "CLASS"},
    {"sentence1": "one NUMBER", "sentence2": "two", "label": "CLASS"},
]
# What a cell may hold: odd numbers, texts that are hard to write or print, wrong types, and depth.
ODD: list[Any] = [
    None, True, 0, -1, 2, 0.5, 1e308, float("nan"), float("inf"), 10**30, "", " ", "\0", "\u200b", "\ud800", "\U0010ffff",
    "<|end|>", "<|bos|>", "x" * 3000, "9" * 5000, "{prompt}", "a/b", " ||| ", "\u2028", [], [None], [[]], ["x", 3], {}, {"text": []},
    {"role": None}, [{"role": "user"}], [ASKED, ANSWERED, ASKED], [{"type": "image_url"}], json.loads("[" * 300 + "]" * 300),
]  # fmt: skip
HOSTILE = [
    b"", b"\xff", b"\xef\xbb\xbf", b"\0", b'"', b"\r", b"\n", b"[", b"[" * 100_000, b"9" * 5000, b"NaN", b"\\ud800", b",", b"||",
]  # fmt: skip


def _numbered(row: dict[str, Any], number: int) -> dict[str, Any]:
    numbered: dict[str, Any] = json.loads(
        json.dumps(row).replace("NUMBER", str(number)).replace("CLASS", str(number % 2))
    )
    return numbered


def _mutated(value: Any, chance: random.Random) -> Any:
    """A value with one place in it changed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        kind = chance.random()
        if kind < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.2:
            return {chance.choice(["id", "", key.upper(), "\ud800", "label"]): 1, **value}
        return {**value, key: _mutated(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], _mutated(value[place], chance), *value[place + chance.randrange(2) :]]
    return chance.choice(ODD)


def _parquet(rows: list[dict[str, Any]], chance: random.Random) -> bytes:
    """The rows as parquet, with a date that Python cannot hold now and then; as one of texts where Arrow has no type for them."""
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        names = {name.encode("utf-8", "replace").decode() for row in rows for name in row}
        table = pa.table({name: [repr(row.get(name)) for row in rows] for name in sorted(names)})
    if chance.random() < 0.2 and table.num_columns:
        days = pa.array([chance.choice([0, 2**31 - 1, -(2**31)]) for _ in rows], pa.date32())
        table = table.append_column(chance.choice(["day", "text"]), days)
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([row.get(name, "") for name in names] for row in rows)]
    lines = [",".join('"' + str(cell).replace('"', '""') + '"' for cell in line) for line in cells]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _content(rows: list[dict[str, Any]], suffix: str, chance: random.Random) -> bytes:
    """The rows as a file of a format, whose bytes are sometimes changed as well."""
    content = {
        ".jsonl": lambda: "\n".join(map(json.dumps, rows)).encode(),
        ".json": lambda: json.dumps(rows, indent=chance.choice([None, 1])).encode(),
        ".csv": lambda: _csv(rows),
        ".txt": lambda: "\n".join(f"{row.get('text', 'x')}||{row}" for row in rows).encode("utf-8", "surrogatepass"),
        ".parquet": lambda: _parquet(rows, chance),
    }[suffix]()
    for _ in range(chance.choice([0, 0, 0, 0, 1, 3])):
        place = chance.randrange(len(content) + 1)
        content = content[:place] + chance.choice(HOSTILE) + content[place + chance.randrange(4) :]
    return content


def _source(path: Path, content: bytes) -> tuple[SourceFile, ...]:
    path.write_bytes(content)
    return (SourceFile(path, hashlib.sha256(content).hexdigest()),)


def try_out(folder: Path, seed: int) -> str:
    """What became of the file of a seed, some of whose rows are changed: the error, or `prepared`."""
    chance = random.Random(seed)
    suffix, form = chance.choice(FORMATS), chance.choice(ROWS)
    form = chance.choice([{"text": "NUMBER"}, form]) if suffix == ".txt" else form
    good = [_numbered(form, number) for number in range(8)]
    rows = [_mutated(row, chance) if chance.random() < 0.4 else row for row in good]
    content = _content([row if isinstance(row, dict) else {"text": row} for row in rows], suffix, chance)
    if chance.random() < 0.1:
        content, suffix = gzip.compress(content)[: chance.choice([None, None, -5])], f"{suffix}.gz"
    heads = ["classification", "regression"] if "label" in form else ["language-model"]
    head = chance.choice(heads if chance.random() < 0.9 else ["language-model", "classification"])
    settings = DataSettings(
        train=["rows"],
        separator="||" if suffix == ".txt" and chance.random() < 0.5 else None,
        max_rejected_share=chance.choice([0.1, 1, 1]),
        train_on_prompt=chance.random() < 0.1,
        chat_template=chance.choice([None, None, None, False]),
        labels=chance.choice([[], ["no", "yes"]]) if head == "classification" else [],
        heldout_rows=chance.choice([None, 1, 100]),
        max_tokens=256,
    )
    sources = DataSources(_source(folder / f"rows{suffix}", content))
    try:
        check_first_rows(settings, sources.sides, head)
        prepare_dataset(settings, sources, folder, 1024, folder / "out", lambda done, total: None, head)
        assert len(load_prepared(folder / "out").train)
    except KasaError as error:
        str(error).encode()  # it can be shown
        return str(error)
    return "prepared"


def _try_all(folder: Path, seeds: range, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("pipeline.data.prepare.load_tokenizer", lambda folder: tokenizer)
    found = []
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        try:
            found.append(try_out(place, seed))
        except Exception as error:
            error.add_note(f"the file of seed {seed}")
            raise
    return found


Try = Callable[[range], list[str]]


@pytest.fixture
def outcomes(tmp_path: Path, chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Try:
    return lambda seeds: _try_all(tmp_path, seeds, chat_tokenizer, monkeypatch)


def test_changed_files_are_prepared_or_refused(outcomes: Try) -> None:
    found = outcomes(range(100))
    assert 10 < found.count("prepared") < 90
    assert len(set(found)) > 30


@pytest.mark.soak
def test_many_changed_files_are_prepared_or_refused(outcomes: Try) -> None:
    outcomes(range(100, 2100))
