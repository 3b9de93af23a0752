"""The forms that rows of data can have (`data.form`), and how each becomes samples.

A form is one entry of `FORMS` and the function that reads a row. A row with several references gives a sample for each; the
held-out ones are joined again (`pipeline.data.split`). What is wrong with the data as a whole (no form fits its columns) is an
error that stops the run. What is wrong with one row is a `Rejection`, to be counted and named. Columns that no sample comes
from are named as not used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from kasa.errors import nearest
from pipeline.config.settings import DataSettings
from pipeline.core.errors import DataError, RecipeError
from pipeline.data.choices import choices_of, labels_in, place_of
from pipeline.data.conversations import (
    HISTORY,
    MESSAGES,
    SYSTEM,
    TOOL_COLUMNS,
    chat_turns,
    history_turns,
    unread_keys,
    with_system,
    with_tools,
)
from pipeline.data.fields import RowError, given_fields, is_given, printable, text_of, texts_of
from pipeline.data.own_form import is_own, own_form_digest, own_function, own_turns
from pipeline.data.prepared import Rejection, Sample
from pipeline.data.readers import RawRow
from pipeline.models.chat import Message
from pipeline.models.prompting import PAIR_SEPARATOR

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
        read: the fields of a row -> its conversations. It raises `RowError` for a row that cannot be used.
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

    def unread(self, values: Mapping[str, Any]) -> Iterator[str]:
        """The columns of a row that say something and that no sample comes from."""
        read = {*given_fields(values, self.required), *self.optional}
        yield from (column for column, value in values.items() if column not in read and is_given(value))
        if read & set(MESSAGES):
            yield from unread_keys(values)

    @property
    def fields(self) -> str:
        """All fields, in words."""
        required = " or ".join(" + ".join(fields) for fields in self.required)
        return required + "".join(f" (+ {field})" for field in self.optional)


def form_names() -> tuple[str, ...]:
    """What `data.form` can be, `auto` first."""
    return (AUTO, *FORMS)


def check_form(settings: DataSettings) -> None:
    """Refuse a form that does not exist.

    Raises:
        RecipeError: with the nearest name.
    """
    if is_own(settings.form):
        own_form_digest(settings.form)
    elif settings.form not in form_names():
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
    found = [printable(column) for column in first]
    for field, column in settings.columns.items():
        if column not in found:
            raise DataError(
                f"{location}: data.columns maps {field} to {column!r}, but the columns are {_listed(found)}"
                f"{nearest(column, found)}"
            )
    if is_own(settings.form):
        return settings.form
    values = _renamed(first, settings)
    # Parquet fills the columns that a row lacks with null; a null of the row's own must not hide its form either.
    given = {field for field, value in values.items() if is_given(value)}
    fitting = _fitting(values, given, settings) or _fitting(values, set(values), settings)
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


def settings_for_head(settings: DataSettings, labelled: bool) -> DataSettings:
    """The settings with the form that a new head asks for."""
    return settings.model_copy(update={"form": "labelled"}) if labelled else settings


def check_head(form: str, labelled: bool) -> None:
    """Refuse texts with a label where there is no head to learn them.

    Raises:
        DataError: that is so.
    """
    if form == "labelled" and not labelled:
        raise DataError("texts with a label need a head to learn it; set base.head: classification or regression")


def read_samples(
    rows: Iterable[RawRow], settings: DataSettings, form: str, unread: dict[str, str] | None = None
) -> Iterator[Sample | Rejection]:
    """Samples and rejections in the order of the rows.

    Args:
        form: what `decide_form` returned.
        unread: takes in the columns that say something and are not used, with the place of the first such row.
    """
    read = _own(form) if is_own(form) else FORMS[form]
    mapped = set(settings.columns.values())
    for row in rows:
        try:
            if row.defect:
                raise RowError(row.defect)
            values = _renamed(row.values, settings)
            for conversation in _conversations(read, values, settings.learn == "last"):
                if settings.train_on_prompt and not all(turn.learned for turn in conversation.turns):
                    raise RowError("weight 0 contradicts data.train_on_prompt: true")
                yield Sample(location=row.location, **conversation._asdict())
        except RowError as error:
            yield Rejection(row.location, str(error))
            continue
        if unread is not None:
            for column in () if is_own(form) else read.unread(values):
                if column not in mapped:
                    unread.setdefault(printable(column), row.location)


def _conversations(form: Form, values: dict[str, Any], last_only: bool) -> list[_Conversation]:
    """What the form reads, with the row's system prompt and tools where the form has them."""
    conversations = form.read(values)
    if last_only:
        conversations = [each._replace(turns=_learning_last(each.turns)) for each in conversations]
    if SYSTEM not in form.optional:
        return conversations
    return [each._replace(turns=with_tools(with_system(each.turns, values), values)) for each in conversations]


def _learning_last(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    return (*(turn._replace(learned=turn.role != "assistant") for turn in turns[:-1]), turns[-1])


def _fitting(values: Mapping[str, Any], present: set[str], settings: DataSettings) -> dict[str, Form]:
    """The forms that the columns allow; for `auto` those that recognise the row."""
    return {
        name: form
        for name, form in FORMS.items()
        if form.fits(present) and (settings.form != AUTO or form.recognises(values))
    }


def _renamed(values: Mapping[str, Any], settings: DataSettings) -> dict[str, Any]:
    """A row with the fields that `data.columns` names in addition to its own columns."""
    return {**values, **{field: values.get(column) for field, column in settings.columns.items()}}


def _listed(columns: list[str]) -> str:
    return ", ".join(columns) or "(none)"


def _pair(prompt: str, answer: str) -> tuple[Message, ...]:
    return Message("user", prompt), Message("assistant", answer)


def _prompt_completion(values: dict[str, Any]) -> list[_Conversation]:
    asked, answered = given_fields(values, FORMS["prompt-completion"].required)
    if answered == "references":
        answered = "completion"
    prompt = text_of(values, asked)
    answers = []
    if is_given(values.get(answered)) or not is_given(values.get("references")):
        answers.append(text_of(values, answered))
    # Data sets often have the column in all splits, with an empty list in the training rows.
    if values.get("references") or not answers:
        answers += texts_of(values, "references")
    return [_Conversation(_pair(prompt, answer)) for answer in dict.fromkeys(answers)]


def _multiple_choice(values: dict[str, Any]) -> list[_Conversation]:
    question, _, answer = given_fields(values, FORMS["multiple-choice"].required)
    choices, names = choices_of(values)
    right = choices[place_of(values.get(answer), choices, names)]
    return [_Conversation(_pair(text_of(values, question), right), choices, choices)]


def _llm_adapters(values: dict[str, Any]) -> list[_Conversation]:
    """Rows of LLM-Adapters' commonsense tasks. Each choice is the output with one of the answers in it."""
    (row,) = _alpaca(values)
    *_, asked, answered = row.turns
    labels, answer, output = labels_in(asked.content), text_of(values, "answer").strip(), answered.content
    if not labels:
        raise RowError("instruction has no `Answer format: a/b/...`")
    if answer not in labels:
        raise RowError("answer is none of the instruction's answer format")
    before, found, after = output.rpartition(answer)
    if not found:
        raise RowError("output does not contain the answer")
    return [row._replace(choices=tuple(f"{before}{label}{after}" for label in labels), labels=labels)]


def _has_answer_format(values: Mapping[str, Any]) -> bool:
    """Alpaca rows may have a column `answer` as well; what tells LLM-Adapters' rows is the list of the answers."""
    instruction = values.get("instruction")
    return isinstance(instruction, str) and bool(labels_in(instruction))


def _alpaca(values: dict[str, Any]) -> list[_Conversation]:
    """`history` has earlier exchanges, as LLaMA-Factory writes them."""
    instruction = text_of(values, "instruction")
    if values.get("input") not in (None, ""):
        instruction += "\n\n" + text_of(values, "input")
    return [_Conversation((*history_turns(values), *_pair(instruction, text_of(values, "output"))))]


def _completion(values: dict[str, Any]) -> list[_Conversation]:
    return [_Conversation((Message("assistant", text_of(values, "text")),))]


def _own(form: str) -> Form:
    function = own_function(form)
    return Form(form, lambda values: [_Conversation(own_turns(form, function, values))], ((),))


def _chat(values: dict[str, Any]) -> list[_Conversation]:
    return [_Conversation(chat_turns(values))]


def _labelled(values: dict[str, Any]) -> list[_Conversation]:
    fields = given_fields(values, LABELLED_TEXTS)
    if fields == ("text",) and is_given(values.get("text_pair")):
        fields = ("text", "text_pair")
    texts = [text_of(values, field) for field in fields]
    if len(texts) == 2 and PAIR_SEPARATOR in texts[0]:
        raise RowError(f"{fields[0]} contains {PAIR_SEPARATOR!r}, which parts the texts of a pair")
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
    return text_of(values, LABEL).strip()


# In the order in which `auto` tries them: data sets often repeat a sample in a further `text` or `messages` column.
FORMS = {
    form.name: form
    for form in (
        Form(
            "multiple-choice",
            _multiple_choice,
            tuple((question, "choices", answer) for question, answer in QUESTIONS_AND_ANSWERS),
            (SYSTEM, *TOOL_COLUMNS),
        ),
        Form(
            "prompt-completion",
            _prompt_completion,
            (*ASKED_AND_ANSWERED, ("prompt", "references")),
            ("references", SYSTEM, *TOOL_COLUMNS),
        ),
        Form(
            "llm-adapters",
            _llm_adapters,
            (("instruction", "output", "answer"),),
            ("input", SYSTEM, HISTORY, *TOOL_COLUMNS),
            _has_answer_format,
        ),
        Form("alpaca", _alpaca, (("instruction", "output"),), ("input", SYSTEM, HISTORY, *TOOL_COLUMNS)),
        Form("chat", _chat, tuple((field,) for field in MESSAGES), (SYSTEM, *TOOL_COLUMNS)),
        Form("completion", _completion, (("text",),)),
        Form("labelled", _labelled, tuple((*texts, LABEL) for texts in LABELLED_TEXTS), ("text_pair",)),
    )
}
