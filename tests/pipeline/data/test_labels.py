"""Texts with labels: which columns are read, which classes there are, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.settings import DataSettings
from pipeline.core.errors import DataError
from pipeline.data.prepare import prepare_dataset
from pipeline.data.prepared import LABELLED_COLUMNS, load_prepared
from pipeline.models.prompting import Head

from .conftest import sources_of

Make = Callable[..., DataSettings]
# One row of each of GLUE's tasks, with the hub's column names.
GLUE = {
    "cola": {"sentence": "They drank the pub dry.", "label": 1, "idx": 0},
    "sst2": {"sentence": "a film of rare warmth", "label": 1, "idx": 0},
    "mrpc": {"sentence1": "He said so.", "sentence2": "So he said.", "label": 1, "idx": 0},
    "qnli": {"question": "Who came?", "sentence": "Nobody came.", "label": 0, "idx": 0},
    "rte": {"sentence1": "It rained.", "sentence2": "It was wet.", "label": 0, "idx": 0},
    "stsb": {"sentence1": "A plane is taking off.", "sentence2": "A plane takes off.", "label": 4.8, "idx": 0},
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(
    folder: Path, tokenizer: Path, rows: list[dict[str, Any]], data: DataSettings, head: Any = "classification"
) -> Any:
    train = write_rows(folder / "rows.jsonl", rows)
    prepare_dataset(data, sources_of(train), tokenizer, 1024, folder / "out", lambda done, total: None, head)
    return load_prepared(folder / "out")


def rows_of(labels: list[Any], **columns: Any) -> list[dict[str, Any]]:
    return [{"text": f"film number {index}", "label": label, **columns} for index, label in enumerate(labels)]


@pytest.mark.parametrize("task", GLUE)
def test_glue_is_recognised_by_its_columns(
    task: str, tmp_path: Path, settings: Make, chat_folder: Path, chat_tokenizer: Any
) -> None:
    kind = "regression" if task == "stsb" else "classification"
    first = next(iter(GLUE[task]))
    rows = [{**GLUE[task], first: f"{GLUE[task][first]} {n}", "label": GLUE[task]["label"] - n % 2} for n in range(90)]
    found = prepared(tmp_path, chat_folder, [row | {"label": abs(row["label"])} for row in rows], settings(), kind)
    assert tuple(found.train.column_names) == LABELLED_COLUMNS
    assert found.head == Head(kind, ("0", "1") if kind == "classification" else (), pairs=len(GLUE[task]) == 4)
    for sample in found.train:
        texts = sample["prompt"].split(" ||| ")
        assert sample["input_ids"] == chat_tokenizer(*texts)["input_ids"]
        assert len(texts) == len(GLUE[task]) - 2
        assert float(sample["references"][0]) == sample["label"]


def test_a_pair_keeps_the_tokenizers_segments(tmp_path: Path, settings: Make) -> None:
    from tests.support.encoders import write_encoder

    tokenizer = write_encoder(tmp_path / "base", "bert")
    rows = [{"text": f"one {n}", "text_pair": "two", "label": n % 2} for n in range(20)]
    sample = prepared(tmp_path, tokenizer, rows, settings()).train[0]
    assert len(sample["token_type_ids"]) == len(sample["input_ids"])
    assert set(sample["token_type_ids"]) == {0, 1}


def test_classes_are_named_by_the_data_or_by_the_recipe(tmp_path: Path, settings: Make, chat_folder: Path) -> None:
    words = prepared(tmp_path, chat_folder, rows_of(["pos", "neg"] * 20), settings())
    assert words.head.classes == ("neg", "pos")
    assert {(row["references"][0], row["label"]) for row in words.train} == {("neg", 0.0), ("pos", 1.0)}
    named = prepared(tmp_path, chat_folder, rows_of([0, 1] * 20), settings(labels=["bad", "good"]))
    assert {(row["references"][0], row["label"]) for row in named.train} == {("bad", 0.0), ("good", 1.0)}
    numbers = prepared(tmp_path, chat_folder, rows_of([10, 9, 2.0] * 20), settings())
    assert numbers.head.classes == ("2", "9", "10")


def test_values_keep_their_fractions(tmp_path: Path, settings: Make, chat_folder: Path) -> None:
    found = prepared(tmp_path, chat_folder, rows_of([0.25, -1, "3.5"] * 20), settings(), "regression")
    assert set(found.train["label"]) == {0.25, -1.0, 3.5}


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (-1, "not labelled"),
        (None, "label is missing"),
        ("maybe", "none of data.labels"),
        (0.5, "none of data.labels"),
        (2, "none of"),
    ],
)
def test_rows_without_a_usable_label_are_rejected(
    labels: Any, reason: str, tmp_path: Path, settings: Make, chat_folder: Path
) -> None:
    data = settings(labels=["bad", "good"], max_rejected_share=0.5)
    found = prepared(tmp_path, chat_folder, rows_of([*([0, 1] * 20), labels]), data)
    assert found.summary["rows_rejected"] == 1
    assert reason in next(iter(found.summary["rejected"]))


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        (rows_of([1] * 40), "classification", "training samples have the label 1"),
        (rows_of([2.5] * 40), "regression", "training samples have the label 2.5"),
        (rows_of([-1] * 40), "classification", "every label is -1"),
        (rows_of([n / 7 for n in range(40)]), "classification", "set base.head: regression"),
        (rows_of([f"word {n}" for n in range(40)]), "classification", "check data.columns"),
        (rows_of(["good", "bad"] * 20), "regression", "label is not a number"),
        ([{"prompt": "a", "completion": "b"}] * 4, "classification", "not the form labelled"),
        ([{"sentence": "a", "label": 1}] * 4, "language-model", "set base.head"),
    ],
)
def test_data_that_a_head_cannot_learn_is_an_error(
    rows: list[dict[str, Any]], head: str, message: str, tmp_path: Path, settings: Make, chat_folder: Path
) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, chat_folder, rows, settings(), head)


def test_both_texts_of_a_pair_decide_the_side(tmp_path: Path, settings: Make, chat_folder: Path) -> None:
    rows = [{"text": "the same", "text_pair": f"another {n // 2}", "label": n % 2} for n in range(80)]
    found = prepared(tmp_path, chat_folder, rows, settings(heldout_share=0.3))
    assert not set(found.train["prompt"]) & set(found.heldout["prompt"])
    assert len(found.heldout) > 10
