"""A judge behind an OpenAI-compatible endpoint: its instructions, its requests, and how its answers are read.

The instructions are this project's own, so grades are comparable with each other and not with published MT-Bench scores.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.apps.judge_answers import Question
from pipeline.core.errors import JudgeError, one_line
from pipeline.core.files import append_journal, read_journal

HIGHEST_GRADE = 10
_GRADE = re.compile(r"grade:\W*(\d+(?:\.\d+)?)", re.IGNORECASE)
_VERDICT = re.compile(r"verdict:\W*(first|second|tie)\b", re.IGNORECASE)
_RETRIES, _PATIENCE_S = 5, 120.0
_GRADING = (
    "You grade the last answer of an assistant in a conversation with a user: is it correct, helpful, complete, and to the "
    "point? Length is no merit. Give your reasons in a few sentences, then a last line of the form `Grade: N`, where N "
    f"is a whole number from 1 (useless) to {HIGHEST_GRADE} (could not be better)."
)
_COMPARING = (
    "Two assistants have had the same conversation with a user. Which one's last answer is better: correct, helpful, "
    "complete, to the point? Neither length nor the order in which they are shown is a merit. Give your reasons in a few "
    "sentences, then a last line of the form `Verdict: first`, `Verdict: second` or `Verdict: tie`."
)

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Request:
    """One request to the judge: the `messages` of the chat, and a key (`about`) that the caller finds the answer by."""

    messages: Messages
    about: tuple[Any, ...]


class Judge:
    """A client of a judge that never asks the same twice: answers of all runs are kept in a cache.

    Args:
        endpoint: the address up to and including `/v1`.
        model: the judge's name there.
        api_key: None for an endpoint that needs none.
        cache: a journal of all answers.
        side_by_side: most requests at once.
    """

    def __init__(self, endpoint: str, model: str, api_key: str | None, cache: Path, side_by_side: int = 8) -> None:
        try:
            import openai
        except ImportError:
            raise JudgeError("a judge needs the package openai: pip install 'kasa-pipeline[judge]'") from None
        self._errors = openai
        self._client = openai.OpenAI(
            base_url=endpoint, api_key=api_key or "none", max_retries=_RETRIES, timeout=_PATIENCE_S
        )
        self.endpoint, self.model, self._cache, self._side_by_side = endpoint, model, cache, side_by_side
        self._known = {record["key"]: record["answer"] for record in read_journal(cache)}
        self._writing = threading.Lock()

    def ask_all(self, requests: Sequence[Request], on_answer: Callable[[int], None] = lambda done: None) -> list[str]:
        """The judge's answers, in the order of the requests.

        Raises:
            JudgeError: the endpoint cannot be reached or refuses; the answers so far are kept.
        """
        with ThreadPoolExecutor(self._side_by_side) as pool:
            waiting = [pool.submit(self._ask, request.messages) for request in requests]
            try:
                for done, finished in enumerate(as_completed(waiting), start=1):
                    finished.result()
                    on_answer(done)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [one.result() for one in waiting]

    def _ask(self, messages: Messages) -> str:
        key = hashlib.sha256(json.dumps([self.model, messages]).encode()).hexdigest()
        if key in self._known:
            return str(self._known[key])
        try:
            reply = self._client.chat.completions.create(model=self.model, messages=messages, temperature=0)  # type: ignore[arg-type]
        except self._errors.APIStatusError as error:
            raise JudgeError(
                f"the judge {self.model} at {self.endpoint} refuses ({error.status_code}: {one_line(error, limit=200)}); check its "
                "name and the key"
            ) from None
        except self._errors.APIConnectionError as error:
            raise JudgeError(
                f"{self.endpoint} does not answer ({one_line(error, limit=200)}); the verdicts so far are kept, the same command "
                "resumes from there"
            ) from None
        answer = (reply.choices[0].message.content if reply.choices else None) or ""
        with self._writing:
            self._known[key] = answer
            append_journal(self._cache, [{"key": key, "model": self.model, "answer": answer}])
        return answer


def grading(question: Question, turn: int, answers: Sequence[str]) -> Messages:
    """Messages that ask for a grade of the answer to turn `turn`, counted from 0."""
    parts = [_conversation(question, turn, answers)]
    if question.references:
        parts.append(f"[A good answer to the last turn]\n{question.references[turn]}")
    return _messages(_GRADING, parts)


def comparing(question: Question, turn: int, first: Sequence[str], second: Sequence[str]) -> Messages:
    """Messages that ask which of two answers to turn `turn`, counted from 0, is better."""
    parts = [
        f"[First assistant]\n{_conversation(question, turn, first)}",
        f"[Second assistant]\n{_conversation(question, turn, second)}",
    ]
    if question.references:
        parts.append(f"[A good answer to the last turn]\n{question.references[turn]}")
    return _messages(_COMPARING, parts)


def read_grade(words: str) -> float | None:
    """The last grade that a judge's answer names, 1 to 10; None where it names none."""
    found = _GRADE.findall(words)
    grade = float(found[-1]) if found else None
    return grade if grade is not None and 1 <= grade <= HIGHEST_GRADE else None


def read_verdict(words: str) -> str | None:
    """The last verdict that a judge's answer names: `first`, `second` or `tie`; None where it names none."""
    found = _VERDICT.findall(words)
    return found[-1].lower() if found else None


def won(shown_first: str | None, shown_second: str | None) -> float | None:
    """The points of a model in one comparison in both orders.

    Args:
        shown_first: the verdict when the model's answer was shown first.
        shown_second: the verdict when it was shown second.

    Returns:
        1 if it won both times, 0 if it lost both times, else 0.5; None where a verdict is missing.
    """
    if shown_first is None or shown_second is None:
        return None
    points = {"first": 1, "tie": 0, "second": -1}[shown_first] - {"first": 1, "tie": 0, "second": -1}[shown_second]
    return 1.0 if points == 2 else 0.0 if points == -2 else 0.5


def _conversation(question: Question, turn: int, answers: Sequence[str]) -> str:
    said = [
        f"[User]\n{question.turns[index]}\n\n[Assistant]\n{answers[index] or '(no answer)'}"
        for index in range(turn + 1)
    ]
    return "\n\n".join(said)


def _messages(instructions: str, parts: Sequence[str]) -> Messages:
    return [{"role": "system", "content": instructions}, {"role": "user", "content": "\n\n".join(parts)}]
