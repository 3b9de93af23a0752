"""The forms that rows of data can have (`data.form`), and how each becomes samples.

A form is one entry of `FORMS` and the function that reads a row. A row with several references gives a sample for each; the
held-out ones are joined again (`pipeline.data.split`). What is wrong with the data as a whole (no form fits its columns) is an
error that stops the run. What is wrong with one row is a `Rejection`, to be counted and named.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from kasa.errors import nearest
from pipeline.config.settings import DataSettings
from pipeline.core.errors import DataError, RecipeError
from pipeline.data.prepared import Rejection, Sample
from pipeline.data.readers import RawRow
from pipeline.models.prompting import PAIR_SEPARATOR, Message

# The form that the columns of the first row decide.
AUTO = "auto"

# The column of labels, and the columns of texts that they belong to: our own names, then those of GLUE's tasks and their like.
# A second text makes a pair.
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
# What is asked and which choice is right: our own names, then those of the hub's ARC and OpenBookQA.
QUESTIONS_AND_ANSWERS = (
    ("prompt", "answer"),
    ("question", "answer"),
    ("question", "answerKey"),
    ("question_stem", "answerKey"),
)
_ANSWER_FORMAT = re.compile(r"^Answer format:[ \t]*(\S.*)$", re.MULTILINE)
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


class _Conversation(NamedTuple):
    """The content of a row, or of one of its references; the fields are those of `Sample`."""

    turns: tuple[Message, ...]
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """One form of rows.

    Attributes:
        name: as `data.form` has it.
        read: the fields of a row -> its conversations. It raises `_RowError` for a row that cannot be used.
        required: the sets of fields of which a row must have one.
        optional: fields that it may have as well.
        recognises: whether a row with the required fields has this form; `auto` asks it, for columns alone may not tell.
    """

    name: str
    read: Callable[[dict[str, Any]], list[_Conversation]]
    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    recognises: Callable[[Mapping[str, Any]], bool] = lambda values: True

    def fits(self, present: set[str]) -> bool:
        """Whether the required fields are among those present."""
        return any(present.issuperset(fields) for fields in self.required)

    @property
    def fields(self) -> str:
        """All fields, in words."""
        required = " or ".join(" + ".join(fields) for fields in self.required)
        return required + "".join(f" (+ {field})" for field in self.optional)


class _RowError(Exception):
    """The reason why one row is rejected."""


def form_names() -> tuple[str, ...]:
    """What `data.form` can be, `auto` first."""
    return (AUTO, *FORMS)


def check_form(settings: DataSettings) -> None:
    """Refuse a form that does not exist.

    Raises:
        RecipeError: with the nearest name.
    """
    if settings.form not in form_names():
        hint = nearest(settings.form, form_names()) or f"; choose one of {', '.join(form_names())}"
        raise RecipeError(f"data.form: there is no form {settings.form!r}{hint}")


def decide_form(settings: DataSettings, first: Mapping[str, Any], location: str) -> str:
    """The form of the data: that of the recipe, or, where it says `auto`, what the first row looks like.

    Args:
        first: the first row.
        location: where that is, for errors.

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
    values = _renamed(first, settings)
    fitting = {name: form for name, form in FORMS.items() if form.fits(set(values))}
    if settings.form == AUTO:
        fitting = {name: form for name, form in fitting.items() if form.recognises(values)}
    chosen = next(iter(fitting), "") if settings.form == AUTO else settings.form
    if chosen not in fitting:
        wanted = "; ".join(f"{name}: {form.fields}" for name, form in FORMS.items() if chosen in ("", name))
        raise DataError(
            f"{location}: columns {_listed(found)} fit {f'not the form {chosen}' if chosen else 'no form'} ({wanted}); "
            "rename them with data.columns, e.g. {prompt: question, completion: answer}"
        )
    form = FORMS[chosen]
    known = dict.fromkeys([*itertools.chain(*form.required), *form.optional])
    for field in settings.columns:
        if field not in known:
            raise DataError(
                f"data.columns: {field!r} is no field of the form {chosen}, which has {form.fields}"
                f"{nearest(field, known)}"
            )
    return chosen


def read_samples(rows: Iterable[RawRow], settings: DataSettings, form: str) -> Iterator[Sample | Rejection]:
    """Samples and rejections in the order of the rows; `form` is what `decide_form` returned."""
    read = FORMS[form].read
    for row in rows:
        try:
            if row.defect:
                raise _RowError(row.defect)
            for conversation in read(_renamed(row.values, settings)):
                yield Sample(location=row.location, **conversation._asdict())
        except _RowError as error:
            yield Rejection(row.location, str(error))


def _renamed(values: Mapping[str, Any], settings: DataSettings) -> dict[str, Any]:
    """A row with the fields that `data.columns` names in addition to its own columns."""
    return {**values, **{field: values.get(column) for field, column in settings.columns.items()}}


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
    # Data sets often have the column in all splits, with an empty list in the training rows.
    if values.get("references") or not answers:
        answers += _texts(values, "references")
    return [_Conversation(_pair(prompt, answer)) for answer in dict.fromkeys(answers)]


def _multiple_choice(values: dict[str, Any]) -> list[_Conversation]:
    """The choices are a list of texts, or, as in the hub's ARC and OpenBookQA, an object of the lists `text` and `label`."""
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
    """The index of the choice that the answer names by its label, its text, its index from 0, or its letter."""
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
    """Rows of LLM-Adapters' commonsense tasks. Each choice is the output with one of the answers in it."""
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


def _has_answer_format(values: Mapping[str, Any]) -> bool:
    """Alpaca rows may have a column `answer` as well; what tells LLM-Adapters' rows is the line with the answers."""
    return bool(_labels_in(str(values.get("instruction"))))


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
    if not isinstance(role, str) or role not in _ROLES:
        raise _RowError(f"role {role!r} is none of {', '.join(_ROLES)}")
    return _ROLES[role]


def _check_order(roles: list[str]) -> None:
    if not roles or roles[-1] != "assistant":
        raise _RowError("the conversation does not end with an assistant turn")
    if "user" not in roles[: roles.index("assistant")]:
        raise _RowError("the conversation has no user turn before its first answer")


# In the order in which `auto` tries them: data sets often repeat a sample in a further `text` or `messages` column.
FORMS = {
    form.name: form
    for form in (
        Form(
            "multiple-choice",
            _multiple_choice,
            tuple((question, "choices", answer) for question, answer in QUESTIONS_AND_ANSWERS),
        ),
        Form("prompt-completion", _prompt_completion, (*ASKED_AND_ANSWERED, ("prompt", "references")), ("references",)),
        Form("llm-adapters", _llm_adapters, (("instruction", "output", "answer"),), ("input",), _has_answer_format),
        Form("alpaca", _alpaca, (("instruction", "output"),), ("input",)),
        Form("chat", _chat, (("messages",), ("conversations",))),
        Form("completion", _completion, (("text",),)),
        Form("labelled", _labelled, tuple((*texts, LABEL) for texts in LABELLED_TEXTS), ("text_pair",)),
    )
}
