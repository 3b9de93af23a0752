"""Prompts for a judge, in MT-Bench's form: a question of one turn or several, its category, perhaps reference answers.

A model's answers to a prompt set, turn after turn, shared out over Ray workers; an interrupted share goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kasa.files import file_digest
from pipeline.core.errors import DataError
from pipeline.core.journal import JournalWriter, Record, read_journal
from pipeline.data.readers import RawRow, read_rows
from pipeline.models.prompting import Message, Prompting
from pipeline.serving.generation import Answerer, greedy_answers, load_answerer


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


@dataclass(frozen=True)
class AnswerShard:
    """A share of the questions: `index`, `index + count`, ...

    Attributes:
        base_folder, adapter: the model; the plain base where `adapter` is None.
        prompting: how it is asked.
        journal: where answers go: records of `question` (its id) and `answers` (one for each turn).
    """

    base_folder: Path
    adapter: Path | None
    prompting: Prompting
    precision: str
    questions: tuple[Question, ...]
    max_new_tokens: int
    batch_size: int
    index: int
    count: int
    journal: Path


def answer_shard(shard: AnswerShard) -> list[Record]:
    """Answer the share's questions that its journal lacks; returns all answers of the share."""
    torch.set_num_threads(1)
    journal = JournalWriter(shard.journal, keep=lambda record: True)
    done = {record["question"] for record in journal.kept}
    open_ = [question for question in shard.questions[shard.index :: shard.count] if question.id not in done]
    if open_:
        answerer = load_answerer(shard.base_folder, shard.adapter, shard.precision, shard.prompting)
        open_.sort(key=lambda question: -len(question.turns[0]))
        for start in range(0, len(open_), shard.batch_size):
            chosen = open_[start : start + shard.batch_size]
            answers = _converse(answerer, chosen, shard.max_new_tokens)
            journal.append([{"question": q.id, "answers": a} for q, a in zip(chosen, answers, strict=True)])
    return read_journal(shard.journal)


def _converse(answerer: Answerer, questions: Sequence[Question], max_new_tokens: int) -> list[list[str]]:
    """Each question's answers; all that have a further turn are asked it together."""
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [index for index, question in enumerate(questions) if turn < len(question.turns)]
        prompts = [_prompt_ids(answerer, questions[index].turns[: turn + 1], answers[index]) for index in asked]
        for index, text in zip(
            asked, greedy_answers(answerer.model, answerer.tokenizer, prompts, max_new_tokens), strict=True
        ):
            answers[index].append(text)
    return answers


def _prompt_ids(answerer: Answerer, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
    said = [Message("user", turns[0])]
    for answer, turn in zip(answers, turns[1:], strict=True):
        said += [Message("assistant", answer), Message("user", turn)]
    return answerer.prompting.conversation_ids(answerer.tokenizer, said)
