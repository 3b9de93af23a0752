"""A form of rows in the user's own code: the documented example, and what can be wrong with one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.settings import DataSettings
from pipeline.core.errors import DataError, RecipeError
from pipeline.data.forms import check_form, decide_form, read_samples
from pipeline.data.own_form import own_form_digest
from pipeline.data.prepared import Rejection, Sample
from pipeline.data.readers import RawRow
from tests.support import ROOT

THREAD = [
    {"by": "asker", "text": "It is stuck. ", "helped": None},
    {"by": "staff", "text": "Turn it off.", "helped": False},
    {"by": "asker", "text": "Still stuck.", "helped": None},
    {"by": "staff", "text": "Oil it.", "helped": True},
]
OTHERS = """
def text(row): return "a text"
def broken(row): return row["absent"]
def tools(row): return {"messages": row["m"], "tools": [{"name": "weather"}], "system": "Be brief."}
value = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A package with the documented example and others, by a name of its own, since modules are imported once."""
    name = f"own_{abs(hash(request.node.name))}"
    tmp_path.joinpath(name).mkdir()
    tmp_path.joinpath(name, "__init__.py").touch()
    (example,) = re.findall(r"```python\n(.*?)```", ROOT.joinpath("docs/running.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 20
    tmp_path.joinpath(name, "rows.py").write_text(example)
    tmp_path.joinpath(name, "others.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def read(form: str, values: dict[str, Any]) -> Sample | Rejection:
    settings = DataSettings(train=["f"], form=form)
    check_form(settings)
    assert decide_form(settings, values, "f:1") == form
    unread: dict[str, str] = {}
    (item,) = read_samples([RawRow("f:1", values)], settings, form, unread)
    assert unread == {}
    return item


def test_the_documented_example(module: str) -> None:
    row = {"product": "doors", "thread": THREAD, "solved": True}
    sample = read(f"{module}.rows:conversation", row)
    assert isinstance(sample, Sample)
    assert [(turn.role, turn.content, turn.learned) for turn in sample.turns] == [
        ("system", "You help with doors.", True),
        ("user", "It is stuck.", True),
        ("assistant", "Turn it off.", False),
        ("user", "Still stuck.", True),
        ("assistant", "Oil it.", True),
    ]
    assert read(f"{module}.rows:conversation", row | {"solved": False}) == Rejection("f:1", "the thread was not solved")


def test_tools_and_a_system_prompt_may_come_with_the_messages(module: str) -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    sample = read(f"{module}.others:tools", {"m": messages})
    assert isinstance(sample, Sample)
    assert [turn.role for turn in sample.turns] == ["tools", "system", "user", "assistant"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text", "returned neither a list of messages nor an object with one, but str"),
        ("broken", "fails: KeyError: 'absent'"),
    ],
)
def test_a_row_that_the_function_cannot_read_is_rejected(module: str, name: str, reason: str) -> None:
    form = f"{module}.others:{name}"
    assert read(form, {}) == Rejection("f:1", f"{form} {reason}")


@pytest.mark.parametrize("form", ["absent_package.rows:f", "json:loads()", ":f", "rows:", "math:sqrt", "..:f"])
def test_a_module_that_is_not_here_is_refused_before_anything_starts(form: str) -> None:
    with pytest.raises(RecipeError, match="names no function of a Python file"):
        check_form(DataSettings(train=["f"], form=form))


@pytest.mark.parametrize(("name", "message"), [("absent", "AttributeError"), ("value", "it is no function but int")])
def test_what_workers_cannot_import_is_named(module: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(f"{module}.others:{name}", {})


def test_its_source_decides_whether_data_is_prepared_again(module: str, tmp_path: Path) -> None:
    before = own_form_digest(f"{module}.rows:conversation")
    file = tmp_path / module / "rows.py"
    file.write_text(file.read_text() + "# changed\n")
    assert own_form_digest(f"{module}.rows:conversation") != before
