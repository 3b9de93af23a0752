"""Rows to samples, by the form that the rows have: see `REQUIRED`.

A row with several references gives a sample for each; the held-out ones are joined again (`stage.join_references`).
What is wrong with the data as a whole (no form fits its columns) stops the run; what is wrong with one row is a
`Rejection`, to be counted and named.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from kasa.errors import nearest
from pipeline.config.settings import DataSettings
from pipeline.core.errors import DataError
from pipeline.data.readers import RawRow
from pipeline.models.heads import PAIR_SEPARATOR
from pipeline.models.prompting import Message

# What labels belong to: our own names, then those of GLUE's tasks and their like. A second text makes a pair.
LABEL = "label"
LABELLED_TEXTS = (
    ("text",),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence",),
)
# What is asked and what is answered: our own names, then those of E2E on the hub, the original and GEM's.
ASKED_AND_ANSWERED = (
    ("prompt", "completion"),
    ("meaning_representation", "human_reference"),
    ("meaning_representation", "target"),
)
# In the order in which `auto` tries them: data sets often repeat a sample in a further `text` or `messages` column.
REQUIRED: dict[str, tuple[tuple[str, ...], ...]] = {
    "multiple-choice": (
        ("prompt", "choices", "answer"),
        ("question", "choices", "answer"),
        ("question", "choices", "answerKey"),
        ("question_stem", "choices", "answerKey"),
    ),
    "prompt-completion": (*ASKED_AND_ANSWERED, ("prompt", "references")),
    "llm-adapters": (("instruction", "output", "answer"),),
    "alpaca": (("instruction", "output"),),
    "chat": (("messages",), ("conversations",)),
    "completion": (("text",),),
    "labelled": tuple((*texts, LABEL) for texts in LABELLED_TEXTS),
}
OPTIONAL = {
    "prompt-completion": ("references",),
    "llm-adapters": ("input",),
    "alpaca": ("input",),
    "labelled": ("text_pair",),
}
_ANSWER_FORMAT = re.compile(r"^Answer format:[ \t]*(\S.*)$", re.MULTILINE)
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


class Rejection(NamedTuple):
    """A row that cannot be used; `reason` is worded so that equal defects have equal reasons."""

    location: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """A conversation ending with an assistant turn, before any template. A lone assistant turn is plain text.

    Of a labelled text the label is that turn; the second text of a pair is a turn of the role `pair`.

    Attributes:
        further: references beside the last turn.
        choices: the answers that the last turn is one of, if there are such.
        labels: how a generated answer names each choice.
    """

    turns: tuple[Message, ...]
    location: str
    further: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What a user would type to get the last turn; for longer conversations the transcript up to there."""
        before = self.turns[:-1]
        if len(before) == 1 and before[0].role == "user":
            return before[0].content
        if self.is_pair:
            return PAIR_SEPARATOR.join(turn.content for turn in before)
        return "\n".join(f"{turn.role}: {turn.content}" for turn in before)

    @property
    def references(self) -> tuple[str, ...]:
        """The last assistant turn, then the further ones; none for plain text, which has no answer to compare with."""
        return (self.turns[-1].content, *self.further) if len(self.turns) > 1 else ()

    @property
    def is_pair(self) -> bool:
        """Whether it is a pair of texts with a label."""
        return len(self.turns) == 3 and self.turns[1].role == "pair"

    @property
    def opening(self) -> str:
        """What samples must not share across the split: all up to the first answer, or the whole of a plain text."""
        first = next(index for index, turn in enumerate(self.turns) if turn.role == "assistant")
        return "\n".join(turn.content for turn in self.turns[: first or 1])


class _RowError(Exception):
    """The reason why one row is rejected."""


def decide_form(settings: DataSettings, first: Mapping[str, Any], location: str) -> str:
    """The form of the data, decided by the first row's columns where the recipe says `auto`.

    Alpaca rows may have a column `answer` as well; what tells those of LLM-Adapters' tasks is the line with the answers.

    Raises:
        DataError: no form fits the columns, or `data.columns` names a field or column that does not exist.
    """
    found = list(first)
    for field, column in settings.columns.items():
        if column not in found:
            raise DataError(
                f"{location}: data.columns maps {field} to {column!r}, but the columns are {_listed(found)}"
                f"{nearest(column, found)}"
            )
    present = {*found, *settings.columns}
    fitting = [form for form, sets in REQUIRED.items() if any(present.issuperset(fields) for fields in sets)]
    if settings.form == "auto" and "llm-adapters" in fitting and not _answer_labels(first, settings):
        fitting.remove("llm-adapters")
    form = settings.form if settings.form != "auto" else next(iter(fitting), "")
    if form not in fitting:
        wanted = "; ".join(f"{name}: {_fields(name)}" for name in REQUIRED if form in ("", name))
        raise DataError(
            f"{location}: columns {_listed(found)} fit {f'not the form {form}' if form else 'no form'} ({wanted}); "
            "rename them with data.columns, e.g. {prompt: question, completion: answer}"
        )
    known = dict.fromkeys([*itertools.chain(*REQUIRED[form]), *OPTIONAL.get(form, ())])
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
            for conversation in build({**row.values, **renamed}):
                yield Sample(location=row.location, **conversation._asdict())
        except _RowError as error:
            yield Rejection(row.location, str(error))


def _fields(form: str) -> str:
    required = " or ".join(" + ".join(fields) for fields in REQUIRED[form])
    return required + "".join(f" (+ {field})" for field in OPTIONAL.get(form, ()))


def _listed(columns: list[str]) -> str:
    return ", ".join(columns) or "(none)"


def _texts(values: dict[str, Any], field: str) -> list[str]:
    """A list of texts, at least one."""
    items = values.get(field)
    if items is None:
        raise _RowError(f"{field} is missing")
    if not isinstance(items, list) or not items:
        raise _RowError(f"{field} is not a list with something in it")
    return [_checked(item, f"one of {field}") for item in items]


def _text(values: dict[str, Any], field: str) -> str:
    return _checked(values.get(field), field)


def _checked(value: Any, field: str) -> str:
    if value is None:
        raise _RowError(f"{field} is missing")
    if not isinstance(value, str):
        raise _RowError(f"{field} is not text but {type(value).__name__}")
    if not value.strip():
        raise _RowError(f"{field} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _RowError(f"{field} is not valid Unicode (half of a surrogate pair)")
    return value


class _Conversation(NamedTuple):
    """What a row says, or one of its references."""

    turns: tuple[Message, ...]
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def _pair(prompt: str, answer: str) -> tuple[Message, ...]:
    return Message("user", prompt), Message("assistant", answer)


def _prompt_completion(values: dict[str, Any]) -> list[_Conversation]:
    asked, answered = next(
        (pair for pair in ASKED_AND_ANSWERED if all(field in values for field in pair)), ASKED_AND_ANSWERED[0]
    )
    prompt = _text(values, asked)
    answers = []
    if values.get(answered) is not None or "references" not in values:
        answers.append(_text(values, answered))
    # Data sets often leave the list of their training rows empty.
    if values.get("references") or not answers:
        answers += _texts(values, "references")
    return [_Conversation(_pair(prompt, answer)) for answer in dict.fromkeys(answers)]


def _multiple_choice(values: dict[str, Any]) -> list[_Conversation]:
    """Choices as a list of texts, or as the hub's ARC and OpenBookQA have them: lists `text` and `label`."""
    question = next((field for field in ("prompt", "question", "question_stem") if field in values), "question")
    given, names = values.get("choices"), []
    if isinstance(given, Mapping):
        names = _texts({"choices.label": given.get("label")}, "choices.label")
        given = given.get("text")
    choices = tuple(choice.strip() for choice in _texts({"choices": given}, "choices"))
    if len(choices) < 2:
        raise _RowError("choices has one entry only")
    if names and len(names) != len(choices):
        raise _RowError("choices has more or fewer labels than texts")
    answer = values.get("answer" if "answer" in values else "answerKey")
    right = choices[_place(answer, choices, names)]
    return [_Conversation(_pair(_text(values, question), right), choices, choices)]


def _place(answer: Any, choices: tuple[str, ...], names: list[str]) -> int:
    """Which choice the answer is: its label, its text, its place from 0, or its letter."""
    if isinstance(answer, str):
        said = answer.strip()
        for known in (names, choices):
            if said in known:
                return known.index(said)
        if not names and len(said) == 1 and said.isascii() and said.isalpha():
            answer = ord(said.upper()) - ord("A")
        elif not names and said.isdecimal():
            answer = int(said)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise _RowError("answer is none of the choices")


def _llm_adapters(values: dict[str, Any]) -> list[_Conversation]:
    """Rows of LLM-Adapters' commonsense tasks: each choice is the output with another answer in place of the right one."""
    (row,) = _alpaca(values)
    labels, answer, output = _labels_in(row.turns[0].content), _text(values, "answer").strip(), row.turns[1].content
    if not labels:
        raise _RowError("instruction has no line `Answer format: a/b/...`")
    if answer not in labels:
        raise _RowError("answer is none of the instruction's answer format")
    before, found, after = output.rpartition(answer)
    if not found:
        raise _RowError("output does not contain the answer")
    return [row._replace(choices=tuple(f"{before}{label}{after}" for label in labels), labels=labels)]


def _answer_labels(first: Mapping[str, Any], settings: DataSettings) -> tuple[str, ...]:
    return _labels_in(str(first.get(settings.columns.get("instruction", "instruction"))))


def _labels_in(instruction: str) -> tuple[str, ...]:
    """`answer1/answer2` of the last line `Answer format: answer1/answer2`; empty where there is none."""
    formats = _ANSWER_FORMAT.findall(instruction)
    labels = tuple(label.strip() for label in formats[-1].split("/")) if formats else ()
    return labels if len(labels) > 1 and all(labels) else ()


def _alpaca(values: dict[str, Any]) -> list[_Conversation]:
    instruction = _text(values, "instruction")
    if values.get("input") not in (None, ""):
        instruction += "\n\n" + _text(values, "input")
    return [_Conversation(_pair(instruction, _text(values, "output")))]


def _completion(values: dict[str, Any]) -> list[_Conversation]:
    return [_Conversation((Message("assistant", _text(values, "text")),))]


def _chat(values: dict[str, Any]) -> list[_Conversation]:
    field = "messages" if values.get("messages") is not None else "conversations"
    items = values.get(field)
    if items is None:
        raise _RowError("messages is missing")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _RowError(f"{field} is not a list of objects")
    role_key, text_key = ("role", "content") if all("role" in item for item in items) else ("from", "value")
    turns = tuple(Message(_role(item, role_key), _text(item, text_key)) for item in items)
    _check_order([turn.role for turn in turns])
    return [_Conversation(turns)]


def _labelled(values: dict[str, Any]) -> list[_Conversation]:
    fields = next((texts for texts in LABELLED_TEXTS if all(field in values for field in texts)), LABELLED_TEXTS[0])
    if fields == ("text",) and values.get("text_pair") is not None:
        fields = ("text", "text_pair")
    texts = [_text(values, field) for field in fields]
    if len(texts) == 2 and PAIR_SEPARATOR in texts[0]:
        raise _RowError(f"{fields[0]} contains {PAIR_SEPARATOR!r}, which parts the texts of a pair")
    label = Message("assistant", _label(values))
    return [_Conversation((*map(Message, ("user", "pair"), texts), label))]


def _label(values: dict[str, Any]) -> str:
    """The label as people would write it: 1 and 1.0 are one class, and so is "1" in a csv file."""
    value = values.get(LABEL)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    return _text(values, LABEL).strip()


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


_BUILDERS: dict[str, Callable[[dict[str, Any]], list[_Conversation]]] = {
    "multiple-choice": _multiple_choice,
    "llm-adapters": _llm_adapters,
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "chat": _chat,
    "completion": _completion,
    "labelled": _labelled,
}
