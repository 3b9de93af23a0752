"""Each form is recognised and read; what is wrong is said of the data as a whole or of one row."""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.apps.recipe_docs import recipe_page
from pipeline.cli import main as cli
from pipeline.config.settings import DataSettings
from pipeline.core.errors import DataError
from pipeline.data.forms import FORMS, Form, check_form, decide_form, read_samples
from pipeline.data.prepared import Rejection, Sample
from pipeline.data.readers import RawRow

Make = Callable[..., DataSettings]
ARC = {"question": "q", "choices": {"text": ["x", "y ", "z"], "label": ["A", "B", "C"]}, "answerKey": "B"}
OBQA = {"question_stem": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
ADAPTERS = {
    "instruction": "Choose: q\n\nAnswer1: x Answer2: y\n\nAnswer format: answer1/answer2",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}
WINOGRANDE = {
    "instruction": "Please choose the correct answer to fill in the blank: Tom passed the ball to Ann because _ was free."
    "\n\nOption1: Tom Option2: Ann Answer format: option1/option2",
    "input": "",
    "output": "the correct answer is option2",
    "answer": "option2",
}
NULLS = ["prompt", "completion", "instruction", "input", "output", "messages", "conversations", "text", "references"]
CHAT = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
SHARED_GPT = {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}
MIXED = [*CHAT["messages"][:1], *SHARED_GPT["conversations"][1:]]


def read(settings: DataSettings, values: dict[str, Any]) -> Sample | Rejection:
    form = decide_form(settings, values, "f:1")
    return next(iter(read_samples([RawRow("f:1", values)], settings, form)))


@pytest.mark.parametrize(
    ("values", "turns"),
    [
        ({"prompt": "p", "completion": "c", "text": "t"}, [("user", "p"), ("assistant", "c")]),
        # E2E on the hub, the original and GEM's.
        ({"meaning_representation": "m", "human_reference": "r"}, [("user", "m"), ("assistant", "r")]),
        (
            {"gem_id": "1", "meaning_representation": "m", "target": "r", "references": []},
            [("user", "m"), ("assistant", "r")],
        ),
        ({"instruction": "i", "input": "", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"instruction": "i", "input": "x", "output": "o"}, [("user", "i\n\nx"), ("assistant", "o")]),
        ({"text": "t"}, [("assistant", "t")]),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            [("user", "u"), ("assistant", "a")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "u"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            [("system", "s"), ("user", "u"), ("assistant", "a")],
        ),
    ],
)
def test_auto_reads_every_form(settings: Make, values: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    sample = read(settings(), values)
    assert isinstance(sample, Sample)
    assert [(turn.role, turn.content) for turn in sample.turns] == turns
    assert all(turn.learned for turn in sample.turns)


def test_columns_rename_even_across_existing_names(settings: Make) -> None:
    renames = settings(columns={"prompt": "completion", "completion": "prompt"})
    sample = read(renames, {"prompt": "answer", "completion": "question"})
    assert isinstance(sample, Sample)
    assert (sample.prompt, sample.references) == ("question", ("answer",))


def test_unknown_columns_list_what_there_is_and_what_would_fit(settings: Make) -> None:
    with pytest.raises(DataError) as caught:
        decide_form(settings(), {"question": "q", "answer": "a"}, "f:1")
    for part in ("f:1", "question, answer", "instruction + output", "messages or conversations", "data.columns"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": "alpaca"}, "fit not the form alpaca"),
        ({"columns": {"prompt": "questoin"}}, "did you mean question"),
        ({"columns": {"promt": "question", "prompt": "question", "completion": "answer"}}, "did you mean prompt"),
    ],
)
def test_wrong_settings_are_explained(settings: Make, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        decide_form(settings(**values), {"question": "q", "answer": "a"}, "f:1")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "p", "completion": None}, "completion is missing"),
        ({"prompt": "p", "completion": " \n"}, "completion is empty"),
        ({"prompt": 3, "completion": "c"}, "prompt is not text but int"),
        ({"prompt": "\ud800", "completion": "c"}, "prompt is not valid Unicode"),
        ({"instruction": "i", "input": 3, "output": "o"}, "input is not text"),
        ({"messages": "x"}, "messages is not a list of objects"),
        ({"messages": []}, "does not end with an assistant turn"),
        ({"messages": [{"role": "user", "content": "u"}]}, "does not end with an assistant turn"),
        ({"messages": [{"role": "assistant", "content": "u"}]}, "no user turn before"),
        ({"messages": [{"role": "model", "content": "u"}]}, "role 'model' is none of"),
    ],
)
def test_an_unusable_row_is_rejected_with_its_reason(settings: Make, values: dict[str, Any], reason: str) -> None:
    rejection = read(settings(), values)
    assert isinstance(rejection, Rejection)
    assert rejection.location == "f:1"
    assert reason in rejection.reason


@pytest.mark.parametrize("absent", [None, ""])
@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "references": ["c", "d"]},
        {"instruction": "i", "output": "o"},
        {"text": "t"},
        CHAT,
        SHARED_GPT,
        WINOGRANDE,
        ARC,
        {"sentence1": "s", "sentence2": "t", "label": 1},
    ],
)
def test_null_is_absent(settings: Make, values: dict[str, Any], absent: str | None) -> None:
    """As parquet fills the columns of rows of several forms, and csv the cells."""
    filled = dict.fromkeys([*NULLS, "question1", "question2", "label", "question", "answerKey"], absent) | values
    assert read(settings(), filled) == read(settings(), values)
    messages = [dict.fromkeys(("role", "content", "from", "value", "weight", "tool_calls")) | item for item in MIXED]
    assert read(settings(), {"messages": messages}) == read(settings(), CHAT)


def test_columns_that_no_sample_comes_from_are_named_once_with_their_first_place(settings: Make) -> None:
    rows = [
        {"instruction": "i", "output": "o", "id": None, "tags": [], "system": "s"},
        {"instruction": "i", "output": "o", "id": 7, "text": "t"},
        {"instruction": "i", "output": "o", "id": 8, "q\ud800": 0},
    ]
    unread: dict[str, str] = {}
    raw = [RawRow(f"f:{number}", row) for number, row in enumerate(rows, 1)]
    list(read_samples(raw, settings(columns={"input": "text"}), "alpaca", unread))
    assert unread == {"id": "f:2", "q\\ud800": "f:3"}
    spoken = [{**item, "name": "Ada"} for item in CHAT["messages"]]
    list(read_samples([RawRow("f:1", {"messages": spoken})], settings(), "chat", unread := {}))
    assert unread == {"messages.name": "f:1"}


def test_prompt_and_opening_of_a_longer_conversation(settings: Make) -> None:
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    sample = read(settings(), {"messages": [{"role": role, "content": text} for role, text in turns]})
    assert isinstance(sample, Sample)
    assert sample.prompt == "user: one\nassistant: two\nuser: three"
    assert (sample.opening, sample.references) == ("one", ("four",))


@pytest.mark.parametrize(
    ("values", "references"),
    [
        ({"prompt": "p", "references": ["a", "b"]}, ["a", "b"]),
        ({"prompt": "p", "completion": "b", "references": ["a", "b"]}, ["b", "a"]),
        ({"prompt": "p", "completion": "c", "references": []}, ["c"]),
        ({"meaning_representation": "m", "target": "a", "references": ["a", "b"]}, ["a", "b"]),
    ],
)
def test_a_row_with_several_references_gives_a_sample_for_each(
    settings: Make, values: dict[str, Any], references: list[str]
) -> None:
    form = decide_form(settings(), values, "f:1")
    samples = list(read_samples([RawRow("f:1", values)], settings(), form))
    assert [sample.turns[-1].content for sample in samples if isinstance(sample, Sample)] == references
    assert {sample.location for sample in samples} == {"f:1"}


@pytest.mark.parametrize("references", ["text", [], ["a", 3], ["a", " "], None])
def test_references_must_be_a_list_of_texts(settings: Make, references: Any) -> None:
    assert isinstance(read(settings(), {"prompt": "p", "references": references}), Rejection)


@pytest.mark.parametrize(
    ("values", "choices", "reference"),
    [
        ({"question": "q", "choices": ["x", "y"], "answer": 1}, ("x", "y"), "y"),
        ({"prompt": "q", "choices": ["x", "y"], "answer": "a"}, ("x", "y"), "x"),
        ({"prompt": "q", "choices": ["x", "y"], "answer": "y"}, ("x", "y"), "y"),
        ({"prompt": "q", "choices": ["B", "A"], "answer": "A"}, ("B", "A"), "A"),
        ({"prompt": "q", "choices": ["x", "y"], "answer": "1"}, ("x", "y"), "y"),
        (ARC, ("x", "y", "z"), "y"),
        (OBQA, ("x", "y"), "y"),
        ({"prompt": "q", "choices": ["x", "y"], "answer": 1.0}, ("x", "y"), "y"),
        (OBQA | {"answerKey": 2}, ("x", "y"), "y"),
        (ADAPTERS, ("the correct answer is answer1", "the correct answer is answer2"), "the correct answer is answer2"),
        (
            WINOGRANDE,
            ("the correct answer is option1", "the correct answer is option2"),
            "the correct answer is option2",
        ),
    ],
)
def test_rows_with_choices(settings: Make, values: dict[str, Any], choices: tuple[str, ...], reference: str) -> None:
    sample = read(settings(), values)
    assert isinstance(sample, Sample)
    assert (sample.choices, sample.references) == (choices, (reference,))
    named = {"llm-adapters": tuple(choice.split()[-1] for choice in choices)}
    assert sample.labels == named.get(decide_form(settings(), values, "f:1"), choices)


def test_alpaca_rows_with_an_answer_column_stay_alpaca(settings: Make) -> None:
    values = {"instruction": "2 + 2?", "output": "It is 4", "answer": "4"}
    assert decide_form(settings(), values, "f:1") == "alpaca"
    assert decide_form(settings(), ADAPTERS, "f:1") == "llm-adapters"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"question": "q", "choices": ["x", "y"], "answer": 2}, "answer is none of the choices"),
        ({"question": "q", "choices": ["x", "y"], "answer": -1}, "answer is none of the choices"),
        ({"question": "q", "choices": ["x", "y"], "answer": True}, "answer is none of the choices"),
        ({"question": "q", "choices": ["x", "y"], "answer": "z"}, "answer is none of the choices"),
        ({"question": "q", "choices": ["x", "y"], "answer": "1" * 5000}, "answer is none of the choices"),
        (OBQA | {"answerKey": 0}, "answer is none of the choices"),
        ({"question": "q", "choices": ["x"], "answer": 0}, "choices has one entry only"),
        ({"question": "q", "choices": "x, y", "answer": 0}, "choices is not a list"),
        (ARC | {"answerKey": "D"}, "answer is none of the choices"),
        (ARC | {"choices": {"text": ["x", "y"], "label": ["A"]}}, "more or fewer labels than texts"),
        (ADAPTERS | {"answer": "answer3"}, "answer is none of the instruction's answer format"),
        (ADAPTERS | {"output": "the second"}, "output does not contain the answer"),
    ],
)
def test_rows_with_wrong_choices(settings: Make, values: dict[str, Any], reason: str) -> None:
    rejection = read(settings(), values)
    assert isinstance(rejection, Rejection)
    assert reason in rejection.reason


@pytest.mark.parametrize(
    "command", [["run"], ["run", "--dry-run"], ["plan"], ["compare"], ["compare", "--dry-run"], ["retrain"], ["submit"]]
)
def test_an_unknown_form_ends_every_command_before_ray_starts(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"name": "x", "workspace": str(tmp_path / "workspace"), "data": {"train": "rows.jsonl", "form": "alpca"}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kasa", command[0], "recipe.json", *command[1:]])
    # What the command does to its own process alone.
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr("ray.init", None)
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "error: data.form: there is no form 'alpca'; did you mean alpaca?" in " ".join((said.out + said.err).split())
    assert not (tmp_path / "workspace" / "artifacts").exists()


def test_a_form_is_one_entry(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new form needs beside its entry is nothing: it is known, recognised, read and documented."""

    def read_riddle(values: dict[str, Any]) -> list[Any]:
        return FORMS["prompt-completion"].read({"prompt": values["riddle"], "completion": values["solution"]})

    monkeypatch.setitem(FORMS, "riddles", Form("riddles", read_riddle, (("riddle", "solution"),)))
    for chosen in ("auto", "riddles"):
        check_form(settings(form=chosen))
        sample = read(settings(form=chosen), {"riddle": "r", "solution": "s"})
        assert isinstance(sample, Sample)
        assert (sample.prompt, sample.references) == ("r", ("s",))
    assert "`labelled`, `riddles`" in recipe_page()
