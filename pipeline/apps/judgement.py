"""`kasa judge`: two models answer questions, a judge grades and compares the answers, and intervals say how sure that is.

Everything is kept in `WORKSPACE/judgements`: answers under the digests of model and questions, and the judge's answers under
its requests. So the same command again only does what is missing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kasa.files import file_digest
from pipeline.apps.judge import Judge, Request, comparing, grading, read_grade, read_verdict, won
from pipeline.apps.judge_answers import AnswerShard, PromptSet, Question, answer_shard, read_prompt_set
from pipeline.cluster.connection import ray_cluster
from pipeline.cluster.workers import Resources, counting, run_journalled_tasks, run_tasks
from pipeline.core.console import ProgressBars
from pipeline.core.errors import JudgeError
from pipeline.core.files import content_digest
from pipeline.metrics.intervals import Interval, measure, paired_differences
from pipeline.models.base import folder_digest
from pipeline.models.prompting import Prompting
from pipeline.serving.export import ModelSource, model_source
from pipeline.tracking.runs import Tracking

BASE = "base"
# Share of answers without a grade or verdict above which a judge cannot be relied on.
_MOST_UNREADABLE = 0.2

# Answers to the turns of each question, by its id.
Answers = Mapping[str, list[str]]
# One entry per turn, by (question id, model) and by (question id, place in which the model was shown).
Grades = dict[tuple[str, str], list[float]]
Verdicts = dict[tuple[str, str], list[str | None]]


@dataclass(frozen=True)
class AnswerSettings:
    """How the models answer, with greedy decoding.

    Attributes:
        max_new_tokens: length limit of an answer.
        batch_size: questions that a worker answers at once.
        workers: number of worker processes.
        gpu: whether each has a GPU.
        precision: `fp32` or `bf16`.
    """

    max_new_tokens: int
    batch_size: int
    workers: int
    gpu: bool
    precision: str


@dataclass(frozen=True)
class Judgement:
    """The judgement of a model against an opponent.

    Attributes:
        model: the model.
        opponent: the other model, or `base`.
        judge: name of the judge.
        questions: number of questions.
        grades: model -> mean grade, 1 to 10.
        difference: model - opponent of the grades, on the same questions.
        win_rate: the share of comparisons that the model wins; a draw counts half. Both orders are asked, and a comparison
            that depends on the order is a draw.
        by_category: category -> model -> mean grade.
        unreadable: answers of the judge without a grade or verdict, which are left out.
        asked: number of the judge's answers.
        folder: where answers and result are kept.
    """

    model: str
    opponent: str
    judge: str
    questions: int
    grades: dict[str, Interval]
    difference: Interval
    win_rate: Interval
    by_category: dict[str, dict[str, float]]
    unreadable: int
    asked: int
    folder: Path

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self) | {"folder": str(self.folder)}


def judge_models(
    model: str,
    opponent: str,
    prompts: Path,
    judge: Judge,
    settings: AnswerSettings,
    workspace: Path,
    base: Path | None,
    bars: ProgressBars,
) -> Judgement:
    """Have two models answer questions, and have the answers judged.

    Args:
        model: adapter folder or registry URI.
        opponent: likewise, or `base` for the model's own base without its adapter.
        prompts: file with the questions.
        judge: the judge.
        settings: how the models answer.
        workspace: where everything is kept.
        base: the base's folder, where it is not the recorded one.
        bars: where progress is shown.

    Raises:
        KasaError: a model, the questions or the judge is not what it should be.
    """
    asked = read_prompt_set(prompts)
    answer = partial(_answers, asked=asked, settings=settings, workspace=workspace, bars=bars)
    with (
        model_source(model, workspace, base, needs_base=True) as own,
        ray_cluster(workspace, settings.workers, settings.workers if settings.gpu else 0),
    ):
        answers = {model: answer(own, own.folder, model)}
        if opponent == BASE:
            answers[BASE] = answer(own, None, BASE)
        else:
            with model_source(opponent, workspace, base, needs_base=True) as other:
                answers[opponent] = answer(other, other.folder, opponent)
    key = content_digest({"answers": answers, "judge": judge.model, "prompts": asked.digest})
    folder = workspace / "judgements" / key[:16]
    judgement = _judged(model, opponent, asked, answers, judge, folder, bars)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.json").write_text(json.dumps(answers, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / "judgement.json").write_text(json.dumps(judgement.as_json(), indent=2), encoding="utf-8")
    _publish(judgement, workspace)
    return judgement


def _answers(
    source: ModelSource,
    adapter: Path | None,
    name: str,
    *,
    asked: PromptSet,
    settings: AnswerSettings,
    workspace: Path,
    bars: ProgressBars,
) -> dict[str, list[str]]:
    """Answers by question id, kept under a digest of everything that they depend on."""
    assert source.base is not None
    form = Prompting.load(source.folder)
    content = {
        "base": folder_digest(source.base),
        "adapter": _folder_digest(adapter) if adapter else "",
        "prompts": asked.digest,
        "form": asdict(form),
        "settings": [settings.max_new_tokens, settings.precision],
    }
    folder = workspace / "judgements" / "answers" / content_digest(content)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    shards = [
        AnswerShard(
            base_folder=source.base.resolve(),
            adapter=adapter.resolve() if adapter else None,
            prompting=form,
            precision=settings.precision,
            questions=asked.questions,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            index=index,
            count=settings.workers,
            journal=(folder / f"shard-{index}-of-{settings.workers}.jsonl").resolve(),
        )
        for index in range(settings.workers)
    ]
    results = run_journalled_tasks(
        run_tasks,
        answer_shard,
        shards,
        Resources(1, settings.gpu),
        journals=[shard.journal for shard in shards],
        follow=counting(bars, f"answers of {name}", len(asked.questions), "questions"),
    )
    return {record["question"]: record["answers"] for records in results for record in records}


def _judged(
    model: str,
    opponent: str,
    asked: PromptSet,
    answers: Mapping[str, Answers],
    judge: Judge,
    folder: Path,
    bars: ProgressBars,
) -> Judgement:
    requests = _requests(asked.questions, model, opponent, answers)
    words = judge.ask_all(requests, lambda done: bars.update("judge", done, len(requests), "verdicts"))
    grades, verdicts, unreadable = _read(requests, words)
    if unreadable > _MOST_UNREADABLE * len(requests):
        raise JudgeError(
            f"{unreadable} of {len(requests)} answers of the judge {judge.model} name no grade or verdict; choose a model "
            f"that follows instructions. One of them: {words[0][-200:]!r}"
        )
    results = {who: _results(asked.questions, grades, verdicts, who) for who in (model, opponent)}
    both = [
        index for index, pair in enumerate(zip(*results.values(), strict=True)) if all("grade" in one for one in pair)
    ]
    compared = [one for one in results[model] if "won" in one]
    if not both or not compared:
        raise JudgeError(f"no question was graded and compared by the judge {judge.model}")
    graded = {who: [rows[index] for index in both] for who, rows in results.items()}
    return Judgement(
        model=model,
        opponent=opponent,
        judge=judge.model,
        questions=len(asked.questions),
        grades={who: measure(rows, ["grade"])["grade"] for who, rows in graded.items()},
        difference=paired_differences(graded[model], graded[opponent], ["grade"])["grade"],
        win_rate=measure(compared, ["win_rate"])["win_rate"],
        by_category=_by_category(asked.questions, graded),
        unreadable=unreadable,
        asked=len(requests),
        folder=folder,
    )


def _requests(
    questions: Sequence[Question], model: str, opponent: str, answers: Mapping[str, Answers]
) -> list[Request]:
    """Four requests for each turn: a grade of either answer, and a comparison in both orders."""
    requests: list[Request] = []
    for question in questions:
        ours, theirs = answers[model][question.id], answers[opponent][question.id]
        for turn in range(len(question.turns)):
            requests += [
                Request(grading(question, turn, ours), (question.id, "grade", model)),
                Request(grading(question, turn, theirs), (question.id, "grade", opponent)),
                Request(comparing(question, turn, ours, theirs), (question.id, "verdict", "first")),
                Request(comparing(question, turn, theirs, ours), (question.id, "verdict", "second")),
            ]
    return requests


def _read(requests: Sequence[Request], words: Sequence[str]) -> tuple[Grades, Verdicts, int]:
    """The grades and verdicts in the judge's answers, and how many answers hold none."""
    grades: Grades = defaultdict(list)
    verdicts: Verdicts = defaultdict(list)
    unreadable = 0
    for request, said in zip(requests, words, strict=True):
        question, kind, which = request.about
        if kind == "verdict":
            verdict = read_verdict(said)
            verdicts[question, which].append(verdict)
            unreadable += verdict is None
        elif (grade := read_grade(said)) is not None:
            grades[question, which].append(grade)
        else:
            unreadable += 1
    return grades, verdicts, unreadable


def _results(questions: Sequence[Question], grades: Grades, verdicts: Verdicts, who: str) -> list[dict[str, Any]]:
    """A result for each question: the mean over its turns, which are not independent samples."""
    results = []
    for question in questions:
        result: dict[str, Any] = {"sample": question.id}
        if found := grades.get((question.id, who)):
            result["grade"] = sum(found) / len(found)
        pairs = zip(verdicts[question.id, "first"], verdicts[question.id, "second"], strict=True)
        if points := [point for first, second in pairs if (point := won(first, second)) is not None]:
            result["won"] = sum(points) / len(points)
        results.append(result)
    return results


def _by_category(
    questions: Sequence[Question], graded: Mapping[str, list[dict[str, Any]]]
) -> dict[str, dict[str, float]]:
    category = {question.id: question.category for question in questions}
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for who, rows in graded.items():
        for row in rows:
            found[category[row["sample"]]][who].append(row["grade"])
    return {name: {who: sum(all_) / len(all_) for who, all_ in of.items()} for name, of in found.items() if name}


def _publish(judgement: Judgement, workspace: Path) -> None:
    tracking = Tracking(workspace, "judgements")
    run = tracking.start_run(f"{judgement.model} against {judgement.opponent}", {"kasa.judge": judgement.judge})
    with tracking.open_run(run):
        values = {"win_rate": judgement.win_rate.estimate, "grade_difference": judgement.difference.estimate}
        sides = dict(zip(("model", "opponent"), judgement.grades.values(), strict=True))
        tracking.log_metrics(run, values | {f"{side}.grade": grade.estimate for side, grade in sides.items()})
        tracking.log_files(run, judgement.folder)


def _folder_digest(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return content_digest({file.relative_to(folder).as_posix(): file_digest(file) for file in files})
