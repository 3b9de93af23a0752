"""Prompts for a judge, in MT-Bench's form: a question of one turn or several, its category, perhaps reference answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kasa.file_digest import file_digest
from pipeline.errors import DataError
from pipeline.prepare.readers import RawRow, read_rows


@dataclass(frozen=True)
class Question:
    """What is asked, turn by turn; `references` has an answer for each turn, or none."""

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class PromptSet:
    """The questions of a file, and the sha256 of its bytes."""

    questions: tuple[Question, ...]
    digest: str


def read_prompt_set(file: Path) -> PromptSet:
    """Questions from rows `{"question_id": ..., "category": ..., "turns": [...], "reference": [...]}`, of which `turns` (or
    `prompt`, for a single turn) is required.

    Raises:
        DataError: the file cannot be read, or a row is no question; with its line.
    """
    questions = tuple(_question(row, number) for number, row in enumerate(read_rows(file), start=1))
    if len({question.id for question in questions}) != len(questions):
        raise DataError(f"{file}: two questions have the same question_id; give each its own")
    return PromptSet(questions, file_digest(file))


def _question(row: RawRow, number: int) -> Question:
    values = row.values
    turns = values.get("turns", values.get("prompt"))
    turns = [turns] if isinstance(turns, str) else turns
    if (
        row.defect
        or not isinstance(turns, list)
        or not turns
        or not all(isinstance(t, str) and t.strip() for t in turns)
    ):
        raise DataError(f"{row.location}: {row.defect or 'turns must be a list of texts, or prompt one text'}")
    references = values.get("reference") or []
    references = [references] if isinstance(references, str) else references
    if len(references) not in (0, len(turns)):
        raise DataError(
            f"{row.location}: {len(references)} references for {len(turns)} turns; give one for each or none"
        )
    return Question(
        str(values.get("question_id", number)), str(values.get("category", "")), tuple(turns), tuple(references)
    )
