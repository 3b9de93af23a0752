"""The choices of a row, and which of them is right."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.data.fields import RowError, texts_of

# Digits of an index; Python refuses to read numbers of thousands of them.
_LONGEST_INDEX = 10
# WinoGrande's rows have it on the line of the options.
_ANSWER_FORMAT = re.compile(r"Answer format:[ \t]*(\S.*)$", re.MULTILINE)


def choices_of(values: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """The texts of the choices and their labels, which are empty where the choices have none.

    The choices are a list of texts, or, as in the hub's ARC and OpenBookQA, an object of the lists `text` and `label`.

    Raises:
        RowError: they are anything else, or fewer than two.
    """
    given, names = values.get("choices"), []
    if isinstance(given, Mapping):
        names = texts_of({"choices.label": given.get("label")}, "choices.label")
        given = given.get("text")
    choices = tuple(choice.strip() for choice in texts_of({"choices": given}, "choices"))
    if len(choices) < 2:
        raise RowError("choices has one entry only")
    if names and len(names) != len(choices):
        raise RowError("choices has more or fewer labels than texts")
    return choices, names


def place_of(answer: Any, choices: tuple[str, ...], names: list[str]) -> int:
    """The index of the choice that the answer names by its label, its text, its index from 0, or its letter.

    Raises:
        RowError: it names none.
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # pandas makes fractions of a column with a gap
    if names and isinstance(answer, int):
        answer = str(answer)
    if isinstance(answer, str):
        said = answer.strip()
        for known in (names, choices):
            if said in known:
                return known.index(said)
        if not names and len(said) == 1 and said.isascii() and said.isalpha():
            answer = ord(said.upper()) - ord("A")
        elif not names and said.isdecimal() and len(said) < _LONGEST_INDEX:
            answer = int(said)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise RowError("answer is none of the choices")


def labels_in(instruction: str) -> tuple[str, ...]:
    """`answer1/answer2` of the last `Answer format: answer1/answer2`; empty where there is none."""
    formats = _ANSWER_FORMAT.findall(instruction)
    labels = tuple(label.strip() for label in formats[-1].split("/")) if formats else ()
    return labels if len(labels) > 1 and all(labels) else ()
