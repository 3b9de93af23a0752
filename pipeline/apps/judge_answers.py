"""Questions for a judge in MT-Bench's form, and a model's answers to them.

Questions are sharded over Ray workers; an interrupted shard resumes where its journal ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kasa.files import file_digest
from pipeline.core.errors import DataError
from pipeline.core.files import JournalWriter, Record, read_journal
from pipeline.data.readers import RawRow, read_rows
from pipeline.models.chat import Message
from pipeline.models.prompting import LANGUAGE_MODEL, Prompting
from pipeline.serving.inference import LoadedModel, load_model


@dataclass(frozen=True)
class Question:
    """A question of one or several turns.

    Attributes:
        id: its `question_id`, or its line.
        category: its category; may be empty.
        turns: what the user says.
        references: a good answer to each turn; empty where there are none.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class PromptSet:
    """The questions of a file, and the SHA-256 of its bytes."""

    questions: tuple[Question, ...]
    digest: str


def read_prompt_set(file: Path) -> PromptSet:
    """Read questions from rows `{"question_id": ..., "category": ..., "turns": [...], "reference": [...]}`.

    Only `turns` is required, or `prompt` instead for a single turn.

    Raises:
        DataError: the file cannot be read, or a row is no question; the error names its line.
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
    """One worker's share of the questions: those at `index`, `index + count`, ...

    Attributes:
        base_folder: the base model.
        adapter: the adapter; None for the plain base.
        prompting: the form of its prompts.
        precision: `fp32` or `bf16`.
        questions: all questions.
        max_new_tokens: length limit of an answer.
        batch_size: questions answered at once.
        index: number of this shard.
        count: how many shards there are.
        journal: file for the answers: records of `question` (its id) and `answers` (one per turn).
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
    """Answer the questions of the shard that its journal lacks; returns all answers of the shard."""
    torch.set_num_threads(1)
    journal = JournalWriter(shard.journal, keep=lambda record: True)
    done = {record["question"] for record in journal.kept}
    missing = [question for question in shard.questions[shard.index :: shard.count] if question.id not in done]
    if missing:
        loaded = load_model(shard.base_folder, shard.adapter, shard.precision, LANGUAGE_MODEL, shard.prompting)
        missing.sort(key=lambda question: -len(question.turns[0]))
        for start in range(0, len(missing), shard.batch_size):
            chosen = missing[start : start + shard.batch_size]
            answers = _converse(loaded, chosen, shard.max_new_tokens)
            journal.append([{"question": q.id, "answers": a} for q, a in zip(chosen, answers, strict=True)])
    return read_journal(shard.journal)


def _converse(loaded: LoadedModel, questions: Sequence[Question], max_new_tokens: int) -> list[list[str]]:
    """The answers to each question; all questions that have a further turn are asked it in one batch."""
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [index for index, question in enumerate(questions) if turn < len(question.turns)]
        prompts = [_prompt_ids(loaded, questions[index].turns[: turn + 1], answers[index]) for index in asked]
        for index, text in zip(asked, loaded.generate(prompts, max_new_tokens), strict=True):
            answers[index].append(text)
    return answers


def _prompt_ids(loaded: LoadedModel, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
    said = [Message("user", turns[0])]
    for answer, turn in zip(answers, turns[1:], strict=True):
        said += [Message("assistant", answer), Message("user", turn)]
    return loaded.prompting.conversation_ids(loaded.tokenizer, said)
