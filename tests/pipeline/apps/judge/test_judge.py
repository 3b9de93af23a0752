"""What a judge is asked, once; what its words mean; what is said when it cannot be asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.apps import judge as judging
from pipeline.apps.judge import Judge, Request, comparing, grading, read_grade, read_verdict, won
from pipeline.apps.judge_answers import Question, read_prompt_set
from pipeline.core.errors import DataError, JudgeError
from tests.support.judge_server import Answering, judge_server, likes_the_first

QUESTION = Question("7", "writing", ("Name a colour.", "Another."), ("Blue.", "Green."))
FIRST, SECOND = ["Red.", "Dark yellow, for one."], ["Red.", "No."]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answering]:
    monkeypatch.setattr(judging, "_RETRIES", 0)
    with judge_server() as answering:
        yield answering


def judge_at(server: Answering, folder: Path) -> Judge:
    return Judge(server.address, "stand-in", None, folder / "verdicts.jsonl")


@pytest.mark.parametrize(
    ("words", "grade"),
    [
        ("Good.\nGrade: 7", 7),
        ("I would say grade: 3 at first, but then\n**Grade: 8.5**", 8.5),
        ("grade:10", 10),
        ("Grade: 11", None),
        ("Grade: 0", None),
        ("Seven.", None),
    ],
)
def test_grades(words: str, grade: float | None) -> None:
    assert read_grade(words) == grade


@pytest.mark.parametrize(
    ("words", "verdict"),
    [("Verdict: first", "first"), ("verdict: **Tie**", "tie"), ("Verdict: third", None), ("the first one", None)],
)
def test_verdicts(words: str, verdict: str | None) -> None:
    assert read_verdict(words) == verdict


def test_only_who_wins_in_both_orders_wins() -> None:
    assert won("first", "second") == 1
    assert won("second", "first") == 0
    for shown_first, shown_second in (("first", "first"), ("second", "second"), ("tie", "tie"), ("first", "tie")):
        assert won(shown_first, shown_second) == 0.5
    assert won("first", None) is won(None, "tie") is None


def test_the_judge_sees_the_conversation_up_to_the_turn() -> None:
    first = grading(QUESTION, 0, FIRST)[1]["content"]
    assert "Name a colour." in first
    assert "Another." not in first
    assert "Blue." in first
    assert "Green." not in first
    second = comparing(QUESTION, 1, FIRST, SECOND)[1]["content"]
    assert (
        second.index("Dark yellow") < second.index("[Second assistant]") < second.index("No.") < second.index("Green.")
    )


def test_what_was_asked_is_not_asked_again(server: Answering, tmp_path: Path) -> None:
    requests = [Request(grading(QUESTION, turn, answers), ()) for turn in (0, 1) for answers in (FIRST, SECOND)]
    words = judge_at(server, tmp_path).ask_all(requests)
    assert [read_grade(said) for said in words] == [2, 2, 6, 1]
    asked = len(server.asked)
    server.status = 500
    assert judge_at(server, tmp_path).ask_all(requests) == words
    assert len(server.asked) == asked


def test_a_judge_that_fails_in_the_middle_has_not_answered_in_vain(server: Answering, tmp_path: Path) -> None:
    first = Request(comparing(QUESTION, 0, FIRST, SECOND), ())
    second = Request(comparing(QUESTION, 1, FIRST, SECOND), ())
    judge_at(server, tmp_path).ask_all([first])
    server.status = 401
    with pytest.raises(
        JudgeError, match=r"stand-in at http.*refuses \(401: .*no such key.*\); check its name and the key"
    ):
        judge_at(server, tmp_path).ask_all([first, second])
    server.status, server.judge = 200, likes_the_first
    assert [read_verdict(said) for said in judge_at(server, tmp_path).ask_all([first, second])] == ["tie", "first"]


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_RETRIES", 0)
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:9/v1 does not answer .* the same command resumes from there"):
        Judge("http://127.0.0.1:9/v1", "m", None, tmp_path / "v.jsonl").ask_all(
            [Request(grading(QUESTION, 0, FIRST), ())]
        )


def test_prompt_sets(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(
        '{"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": ["c", "d"]}\n{"prompt": "e"}\n'
    )
    read = read_prompt_set(file).questions
    assert read == (Question("81", "writing", ("a", "b"), ("c", "d")), Question("2", "", ("e",), ()))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ('{"turns": []}', "questions.jsonl:1: turns must be a list of texts"),
        ('{"turns": ["a", 1]}', "turns must be a list of texts"),
        ('{"turns": ["a", "b"], "reference": ["c"]}', "1 references for 2 turns"),
        (
            '{"question_id": 1, "prompt": "a"}\n{"question_id": 1, "prompt": "b"}',
            "two questions have the same question_id",
        ),
    ],
)
def test_what_is_no_prompt_set(tmp_path: Path, rows: str, says: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(rows + "\n")
    with pytest.raises(DataError, match=says):
        read_prompt_set(file)
