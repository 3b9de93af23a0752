"""Rows to samples. Four forms: prompt-completion, alpaca, chat and completion (plain text).

What is wrong with the data as a whole (no form fits its columns) stops the run; what is wrong with one row is a
`Rejection`, to be counted and named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from kasa.errors import nearest
from pipeline.errors import DataError
from pipeline.prepare.readers import RawRow
from pipeline.prompting import Message
from pipeline.settings import DataSettings

# In the order in which `auto` tries them: data sets often repeat a sample in a further `text` or `messages` column.
REQUIRED: dict[str, tuple[tuple[str, ...], ...]] = {
    "prompt-completion": (("prompt", "completion"),),
    "alpaca": (("instruction", "output"),),
    "chat": (("messages",), ("conversations",)),
    "completion": (("text",),),
}
OPTIONAL = {"alpaca": ("input",)}
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


class Rejection(NamedTuple):
    """A row that cannot be used; `reason` is worded so that equal defects have equal reasons."""

    location: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """A conversation ending with an assistant turn, before any template. A lone assistant turn is plain text."""

    turns: tuple[Message, ...]
    location: str

    @property
    def prompt(self) -> str:
        """What a user would type to get the last turn; for longer conversations the transcript up to there."""
        before = self.turns[:-1]
        if len(before) == 1 and before[0].role == "user":
            return before[0].content
        return "\n".join(f"{turn.role}: {turn.content}" for turn in before)

    @property
    def reference(self) -> str:
        """The last assistant turn; empty for plain text, which has no answer to compare with."""
        return self.turns[-1].content if len(self.turns) > 1 else ""

    @property
    def opening(self) -> str:
        """What samples must not share across the split: all up to the first answer, or the whole of a plain text."""
        first = next(index for index, turn in enumerate(self.turns) if turn.role == "assistant")
        return "\n".join(turn.content for turn in self.turns[: first or 1])


class _RowError(Exception):
    """The reason why one row is rejected."""


def decide_form(settings: DataSettings, columns: Iterable[str], location: str) -> str:
    """The form of the data, decided by the first row's columns where the recipe says `auto`.

    Raises:
        DataError: no form fits the columns, or `data.columns` names a field or column that does not exist.
    """
    found = list(columns)
    for field, column in settings.columns.items():
        if column not in found:
            raise DataError(
                f"{location}: data.columns maps {field} to {column!r}, but the columns are {_listed(found)}"
                f"{nearest(column, found)}"
            )
    present = {*found, *settings.columns}
    fitting = [form for form, sets in REQUIRED.items() if any(present.issuperset(fields) for fields in sets)]
    form = settings.form if settings.form != "auto" else next(iter(fitting), "")
    if form not in fitting:
        wanted = "; ".join(f"{name}: {_fields(name)}" for name in REQUIRED if form in ("", name))
        raise DataError(
            f"{location}: columns {_listed(found)} fit {f'not the form {form}' if form else 'no form'} ({wanted}); "
            "rename them with data.columns, e.g. {prompt: question, completion: answer}"
        )
    known = [field for fields in REQUIRED[form] for field in fields] + list(OPTIONAL.get(form, ()))
    for field in settings.columns:
        if field not in known:
            raise DataError(
                f"data.columns: {field!r} is no field of the form {form}, which has {_fields(form)}"
                f"{nearest(field, known)}"
            )
    return form


def read_samples(rows: Iterable[RawRow], settings: DataSettings, form: str) -> Iterator[Sample | Rejection]:
    """Samples and rejections in the order of the rows; `form` as `decide_form` gave it."""
    build = _BUILDERS[form]
    for row in rows:
        try:
            if row.defect:
                raise _RowError(row.defect)
            renamed = {field: row.values.get(column) for field, column in settings.columns.items()}
            yield Sample(build({**row.values, **renamed}), row.location)
        except _RowError as error:
            yield Rejection(row.location, str(error))


def _fields(form: str) -> str:
    required = " or ".join(" + ".join(fields) for fields in REQUIRED[form])
    return required + "".join(f" (+ {field})" for field in OPTIONAL.get(form, ()))


def _listed(columns: list[str]) -> str:
    return ", ".join(columns) or "(none)"


def _text(values: dict[str, Any], field: str) -> str:
    value = values.get(field)
    if value is None:
        raise _RowError(f"{field} is missing")
    if not isinstance(value, str):
        raise _RowError(f"{field} is not text but {type(value).__name__}")
    if not value.strip():
        raise _RowError(f"{field} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _RowError(f"{field} is not valid Unicode (half of a surrogate pair)")
    return value


def _prompt_completion(values: dict[str, Any]) -> tuple[Message, ...]:
    return Message("user", _text(values, "prompt")), Message("assistant", _text(values, "completion"))


def _alpaca(values: dict[str, Any]) -> tuple[Message, ...]:
    instruction = _text(values, "instruction")
    if values.get("input") not in (None, ""):
        instruction += "\n\n" + _text(values, "input")
    return Message("user", instruction), Message("assistant", _text(values, "output"))


def _completion(values: dict[str, Any]) -> tuple[Message, ...]:
    return (Message("assistant", _text(values, "text")),)


def _chat(values: dict[str, Any]) -> tuple[Message, ...]:
    field = "messages" if values.get("messages") is not None else "conversations"
    items = values.get(field)
    if items is None:
        raise _RowError("messages is missing")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _RowError(f"{field} is not a list of objects")
    role_key, text_key = ("role", "content") if all("role" in item for item in items) else ("from", "value")
    turns = tuple(Message(_role(item, role_key), _text(item, text_key)) for item in items)
    _check_order([turn.role for turn in turns])
    return turns


def _role(item: dict[str, Any], key: str) -> str:
    role = item.get(key)
    if not isinstance(role, str) or role not in ROLES:
        raise _RowError(f"role {role!r} is none of {', '.join(ROLES)}")
    return ROLES[role]


def _check_order(roles: list[str]) -> None:
    if not roles or roles[-1] != "assistant":
        raise _RowError("the conversation does not end with an assistant turn")
    if "user" not in roles[: roles.index("assistant")]:
        raise _RowError("the conversation has no user turn before its first answer")


_BUILDERS: dict[str, Callable[[dict[str, Any]], tuple[Message, ...]]] = {
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "chat": _chat,
    "completion": _completion,
}
