"""Every shipped recipe prepares rows of the published shape of each of its sources; the content is invented."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import load_recipe, named_recipes
from pipeline.data.prepare import prepare_dataset
from pipeline.data.prepared import load_prepared
from pipeline.data.sources import DataSources

from .conftest import build_tokenizer, sources_of

Row = dict[str, Any]
COUNT = 40


def _choice(task: str, question: str, options: list[str], names: list[str]) -> Callable[[int], Row]:
    """A row of LLM-Adapters' commonsense tasks."""

    def row(number: int) -> Row:
        between = "\n\n" if task == "piqa" else " "
        listed = between.join(f"{name.capitalize()}: {text}" for name, text in zip(names, options, strict=True) if text)
        # WinoGrande's rows alone have the options and the answer format on one line.
        parted = " " if task == "winogrande" else "\n\n"
        asked = f"{question.format(number)}\n\n{listed}{parted}" if listed else f"{question.format(number)}\n\n"
        right = names[number % len(names)]
        return {
            "instruction": f"{asked}Answer format: {'/'.join(names)}",
            "input": "",
            "output": f"the correct answer is {right}",
            "answer": right,
        }

    return row


def _numbered(word: str, count: int) -> list[str]:
    return [f"{word}{number}" for number in range(1, count + 1)]


COMMONSENSE = {
    "boolq": _choice("boolq", "Please answer the following question with true or false, question: is {} odd?", ["", ""], ["true", "false"]),
    "piqa": _choice("piqa", "Please choose the correct solution to the question: fill {} cups", ["pour", "wait"], _numbered("solution", 2)),
    "social_i_qa": _choice("social_i_qa", "Please choose the correct answer to the question: Ann met {} people. Why?", ["to talk", "to eat", "to rest"], _numbered("answer", 3)),
    "hellaswag": _choice("hellaswag", "Please choose the correct ending to complete the given sentence: Run: A man runs {} miles.", ["he stops.", "he flies.", "he sings.", "he melts."], _numbered("ending", 4)),
    "winogrande": _choice("winogrande", "Please choose the correct answer to fill in the blank to complete the given sentence: Ann gave Tom {} cakes since _ was kind.", ["Ann", "Tom"], _numbered("option", 2)),
    "ARC-Easy": _choice("ARC-Easy", "Please choose the correct answer to the question: What melts at {} C?", ["ice", "iron", "wood", "sand"], _numbered("answer", 4)),
    "ARC-Challenge": _choice("ARC-Challenge", "Please choose the correct answer to the question: Why do {} birds fly?", ["food", "fun", "fear", "fate"], _numbered("answer", 4)),
    "openbookqa": _choice("openbookqa", "Please choose the correct answer to the question: {} suns are", ["stars", "moons", "rocks", "lamps"], _numbered("answer", 4)),
}  # fmt: skip


def _alpaca(number: int) -> Row:
    return {"output": f"It is {number}.", "input": "" if number % 2 else f"{number}", "instruction": f"Say {number}."}


def _duo(number: int) -> Row:
    turns = [{"content": f"Write {number}.", "role": "user"}, {"content": f"{number}", "role": "assistant"}]
    return {
        "generator": "gpt-4o-2024-05-13",
        "prompt_id": f"{number:064x}",
        "seed_prompt": "Write a number.",
        "messages": turns,
        "category": "Coding",
    }


def _glue(*fields: str, classes: int | None = 2) -> Callable[[int], Row]:
    def row(number: int) -> Row:
        label = number % classes if classes else number % 26 / 5
        return {field: f"The {field} {number}." for field in fields} | {"label": label, "idx": number}

    return row


def _review(label: Any) -> Callable[[int], Row]:
    return lambda number: {"prompt": f"It was film {number}.", "completion": label(number)}


def _e2e(number: int) -> str:
    return f"name : Inn {number} | Type : pub | area : riverside||Inn {number} is a pub in the riverside area ."


# By what stands in a source's name: its rows, and how the file ends.
SHAPES: dict[str, tuple[Callable[[int], Any], str]] = {
    "embedded:movie-reviews": (_review(lambda number: "positive" if number % 3 else "negative"), "jsonl"),
    "embedded:movie-review-ratings": (_review(lambda number: number / 10), "jsonl"),
    "hub:yahma/alpaca-cleaned": (_alpaca, "parquet"),
    "hub:llama-duo/synth_": (_duo, "parquet"),
    "hub:zwhe99/commonsense_170k": (lambda number: list(COMMONSENSE.values())[number % 8](number), "parquet"),
    **{f"LLM-Adapters/main/dataset/{task}/": (row, "json") for task, row in COMMONSENSE.items()},
    "examples/NLG/data/e2e/": (_e2e, "txt"),
    "glue/cola": (_glue("sentence"), "parquet"),
    "glue/sst2": (_glue("sentence"), "parquet"),
    "glue/mrpc": (_glue("sentence1", "sentence2"), "parquet"),
    "glue/rte": (_glue("sentence1", "sentence2"), "parquet"),
    "glue/qnli": (_glue("question", "sentence"), "parquet"),
    "glue/stsb": (_glue("sentence1", "sentence2", classes=None), "parquet"),
}


def published(source: str, folder: Path, first: int) -> Path:
    """A file of the shape of a source, with rows from number `first` on."""
    shape, ending = next(value for name, value in SHAPES.items() if name in source)
    rows = [shape(number) for number in range(first, first + COUNT)]
    file = folder / f"{first}.{ending}"
    if ending == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), file)
    elif ending == "json":
        file.write_text(json.dumps(rows, indent=4))
    else:
        file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return file


def sides(sources: list[str], folder: Path, first: int) -> DataSources:
    """All files of one side, as its training files."""
    files = [published(source, folder, first + COUNT * place) for place, source in enumerate(sources)]
    return DataSources(tuple(file for path in files for file in sources_of(path).train), (), ())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_tokenizer(None).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", named_recipes())
def test_a_shipped_recipe_prepares_what_its_sources_publish(name: str, tmp_path: Path, base: Path) -> None:
    recipe = load_recipe(named_recipes()[name])
    train = sides(recipe.data.train, tmp_path, 0)
    heldout = sides(recipe.data.heldout, tmp_path, 100_000)
    sources = DataSources(train.train, heldout.train, ())
    # The tiny tokenizer needs a token for nearly every character.
    settings = recipe.data.model_copy(update={"max_tokens": 2048})
    summary = prepare_dataset(
        settings, sources, base, 4096, tmp_path / "out", lambda done, total: None, recipe.base.head
    )
    rows = COUNT * (len(recipe.data.train) + len(recipe.data.heldout))
    assert (summary["rows_read"], summary["rows_rejected"]) == (rows, 0)
    assert summary["rows_kept"] == rows - summary["duplicates_removed"] == rows
    if recipe.data.form != "auto":
        assert summary["form"] == recipe.data.form
    prepared = load_prepared(tmp_path / "out")
    if recipe.base.head != "language-model":
        assert summary["form"] == "labelled"
        return
    tokenizer = build_tokenizer(None)
    row = prepared.heldout[0]
    assert row["references"][0] in tokenizer.decode([label for label in row["labels"] if label >= 0])
    assert bool(row["choices"]) == (recipe.data.form == "llm-adapters")
