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
from pipeline.data.forms import check_first_rows
from pipeline.data.prepare import prepare_dataset
from pipeline.data.prepared import load_prepared
from pipeline.data.readers import FORMATS
from pipeline.data.sources import DataSources, SourceFile

ASKED, ANSWERED = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "weight": 1}
ROWS: list[dict[str, Any]] = [
    {"prompt": "p", "completion": "c", "references": ["c", "d"], "system": "s"},
    {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["a", "b"]]},
    {
        "instruction": "Option1: x Option2: y Answer format: option1/option2",
        "input": "",
        "output": "the correct answer is option2",
        "answer": "option2",
    },
    {"question": "q", "choices": ["x", "y"], "answer": "1"},
    {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    {"messages": [{"role": "developer", "content": [{"type": "text", "text": "b"}]}, ASKED, ANSWERED]},
    {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "system": "s", "tools": None},
    {"text": "plain text"},
    {"text": "one", "text_pair": "two", "label": 1},
    {"sentence1": "one", "sentence2": "two", "label": "yes"},
    {"meaning_representation": "m", "human_reference": "r"},
]
# What a cell may hold: odd numbers, texts that are hard to write or print, wrong types, and depth.
ODD: list[Any] = [
    None, True, 0, -1, 2, 0.5, 1e308, float("nan"), float("inf"), 10**30, "", " ", "\0", "\u200b", "\ud800", "\U0010ffff",
    "<|end|>", "<|bos|>", "x" * 3000, "9" * 5000, "{prompt}", "a/b", " ||| ", "\u2028", [], [None], [[]], ["x", 3], {}, {"text": []},
    {"role": None}, [{"role": "user"}], [ASKED, ANSWERED, ASKED], [{"type": "image_url"}], json.loads("[" * 300 + "]" * 300),
]  # fmt: skip
HOSTILE = [
    b"\xff",
    b"\xef\xbb\xbf",
    b"\0",
    b'"',
    b"\r",
    b"\n",
    b"[",
    b"[" * 100_000,
    b"9" * 5000,
    b"NaN",
    b"\\ud800",
    b",",
]


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
    if chance.random() < 0.2:
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


def data_file(folder: Path, chance: random.Random) -> Path:
    """A data file of some format with rows of some form, something in which is changed: values, bytes, or both."""
    suffix = chance.choice(FORMATS)
    row = chance.choice(ROWS)
    rows = [
        row,
        *(_mutated(row, chance) if chance.random() < 0.7 else dict(row) for _ in range(chance.randrange(1, 6))),
    ]
    rows = [each if isinstance(each, dict) else {"text": each} for each in rows]
    chance.shuffle(rows)
    content = {
        ".jsonl": lambda: "\n".join(map(json.dumps, rows)).encode(),
        ".json": lambda: json.dumps(rows, indent=chance.choice([None, 1])).encode(),
        ".csv": lambda: _csv(rows),
        ".txt": lambda: "\n".join(str(next(iter(each.values()), "")) for each in rows).encode("utf-8", "surrogatepass"),
        ".parquet": lambda: _parquet(rows, chance),
    }[suffix]()
    for _ in range(chance.choice([0, 0, 0, 1, 3])):
        place = chance.randrange(len(content) + 1)
        content = content[:place] + chance.choice([b"", *HOSTILE]) + content[place + chance.randrange(4) :]
    if chance.random() < 0.1:
        content, suffix = gzip.compress(content)[: chance.choice([None, -5])], f"{suffix}.gz"
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    return path


def try_out(folder: Path, seed: int) -> str:
    """What became of the file of a seed: the error, or `prepared`."""
    chance = random.Random(seed)
    path = data_file(folder, chance)
    head = chance.choice(["language-model", "language-model", "language-model", "classification", "regression"])
    settings = DataSettings(
        train=[str(path)],
        separator="2+2" if path.suffix == ".txt" and chance.random() < 0.3 else None,
        max_rejected_share=1,
        train_on_prompt=chance.random() < 0.1,
        chat_template=chance.choice([None, None, False]),
        labels=chance.choice([[], ["no", "yes"]]) if head == "classification" else [],
        max_tokens=256,
    )
    sources = DataSources((SourceFile(path, hashlib.sha256(path.read_bytes()).hexdigest()),))
    try:
        check_first_rows(settings, sources.sides, head != "language-model")
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
