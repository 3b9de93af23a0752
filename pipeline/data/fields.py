"""The fields of a row, checked.

A field that is null counts as absent: parquet fills the fields that a row lacks with null, as csv does with empty cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class RowError(Exception):
    """The reason why one row is rejected, worded so that equal defects have equal reasons."""


def is_given(value: Any) -> bool:
    """Whether a field says anything: null, an empty text (as csv has it) and an empty list do not."""
    return value is not None and value not in ("", [], {})


def printable(text: str) -> str:
    """A text as any terminal and file can take it: halves of surrogate pairs are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def given_fields(values: Mapping[str, Any], alternatives: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The first of several sets of fields that a row has all of, if need be with null among them; else the first of all."""
    given = (fields for fields in alternatives if all(is_given(values.get(field)) for field in fields))
    named = (fields for fields in alternatives if all(field in values for field in fields))
    return next(given, None) or next(named, alternatives[0])


def text_of(values: Mapping[str, Any], field: str) -> str:
    """A field that must be a text.

    Raises:
        RowError: it is missing, empty, no text or no valid Unicode.
    """
    return checked_text(values.get(field), field)


def texts_of(values: Mapping[str, Any], field: str) -> list[str]:
    """A field that must be a list of texts, at least one.

    Raises:
        RowError: it is anything else.
    """
    items = values.get(field)
    if items is None:
        raise RowError(f"{field} is missing")
    if not isinstance(items, list) or not items:
        raise RowError(f"{field} is not a list with something in it")
    return [checked_text(item, f"one of {field}") for item in items]


def checked_text(value: Any, field: str) -> str:
    """The value of a field, which must be a text.

    Raises:
        RowError: it is missing, empty, no text or no valid Unicode.
    """
    if value is None:
        raise RowError(f"{field} is missing")
    if not isinstance(value, str):
        raise RowError(f"{field} is not text but {type(value).__name__}")
    if not value.strip():
        raise RowError(f"{field} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RowError(f"{field} is not valid Unicode (half of a surrogate pair)")
    return value
