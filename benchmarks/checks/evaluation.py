"""Evaluation: metrics against the libraries that define them, multiple choice against lm-evaluation-harness, and scaling."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core import ROOT, CannotRunError, Measurement, Setting, check
from benchmarks.texts import review_rows
from kasa import KasaError
from pipeline.cluster.connection import ray_cluster
from pipeline.cluster.workers import Resources, run_tasks
from pipeline.config.evaluate import EvaluateSettings
from pipeline.config.settings import DataSettings
from pipeline.core.journal import Record, read_journal
from pipeline.data.prepare import prepare_dataset
from pipeline.data.prepared import load_prepared
from pipeline.data.sources import DataSources, SourceFile
from pipeline.evaluation.worker import EvaluationShard, evaluate_shard
from pipeline.metrics.catalogue import METRICS
from pipeline.metrics.intervals import measure
from pipeline.metrics.text import tokens, words
from pipeline.models.embedded import embedded_base

SHARED = ROOT.parent / "shared" / "data"
BASE, MAX_TOKENS = "smollm2-135m-instruct", 512
SCALING_SAMPLES = 1000
ANSWERS = re.compile(r"Answer\d+: ")
Rows = list[dict[str, Any]]


@check(bar=1e-9, direction="at most", unit="", judges="largest relative difference")
def eval_metrics(setting: Setting) -> Measurement:
    """Text metrics of E2E's references with words dropped, against the libraries themselves on the same texts."""
    results = damaged_references(_shared("e2e/test.txt"), 300)
    theirs = library_values(results)
    ours = {name: interval.estimate for name, interval in measure(results, list(theirs)).items()}
    worst = max(abs(ours[name] - value) / abs(value) for name, value in theirs.items())
    missing = sorted(name for name in ("cider", "meteor") if name not in theirs)
    return Measurement(
        worst, {"samples": len(results), "ours": ours, "libraries": theirs, "not_measurable_here": missing}
    )


@check(bar=1e-3, direction="at most", unit="nats", judges="largest difference of a log-likelihood")
def eval_multiple_choice(setting: Setting) -> Measurement:
    """Log-likelihoods and accuracies of SmolLM2-135M on 100 OpenBookQA and 100 ARC questions, against lm-evaluation-harness."""
    base = _base(setting)
    tasks = {
        # What is asked and answered is the text; then the name of an answer that the question lists.
        "openbookqa": (questions(_shared("commonsense/openbookqa/test.json"), 100), "Question: {prompt}\nAnswer: "),
        "arc_easy_llm_adapters": (_listed("commonsense/ARC-Easy/test.json", 100), "{prompt}\n\nResponse: "),
    }
    worst, details, flaws = 0.0, {}, []
    for name, (rows, template) in tasks.items():
        compared = against_harness(base, rows, template, setting.scratch / name)
        worst = max(worst, compared["largest_difference"])
        details[name] = compared
        flaws += [
            f"{name}: {metric} is {compared['ours'][metric]}, the harness finds {compared['harness'][metric]}"
            for metric in ("accuracy", "accuracy_norm")
            if compared["ours"][metric] != compared["harness"][metric]
        ]
    return Measurement(worst, details, flaws=tuple(flaws))


@check(bar=1.6, direction="at least", unit="times")
def eval_scaling(setting: Setting) -> Measurement:
    """Speed of evaluating 1,000 reviews by 2 workers of one thread each, over 1 worker; loading the model is included."""
    base = _base(setting)
    rows = review_rows(setting.workspace)[:SCALING_SAMPLES]
    prepared = prepare_rows(base, rows, setting.scratch / "scaling", prompt_template="Review: {prompt}\nSentiment: ")
    settings = EvaluateSettings(kind="choice", choices=["positive", "negative"], samples_shown=0)
    seconds, results = {}, {}
    with ray_cluster(setting.workspace, 2, 0):
        for count in (1, 2):
            shards = shards_of(base, prepared, settings, count, setting.scratch / f"scaling-{count}")
            seconds[count] = max(run_tasks(timed_shard, shards, Resources(1)))
            results[count] = results_of(shards)
    flaws = () if results[1] == results[2] else (_difference(results[1], results[2]),)
    return Measurement(
        seconds[1] / seconds[2],
        {
            "samples": len(results[1]),
            "seconds": {"1 worker": seconds[1], "2 workers": seconds[2]},
            "seconds_are": "of the slowest worker, from loading the model to the last result; the start of its process is not",
        },
        flaws=flaws,
    )


def damaged_references(path: Path, count: int) -> list[Record]:
    """E2E's test set by meaning: an output made from the first reference, and the others to compare it with."""
    groups: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        meaning, _, reference = line.partition("||")
        groups.setdefault(meaning.strip(), []).append(reference.strip())
    chance = random.Random(0)
    results: list[dict[str, Any]] = []
    for references in [several for several in groups.values() if len(several) > 1][:count]:
        kept = [word for word in references[0].split() if chance.random() > 0.15]
        results.append({"sample": len(results), "output": " ".join(kept), "references": references[1:]})
    return results


def library_values(results: Sequence[Record]) -> dict[str, float]:
    """What the libraries say of the same corpus; METEOR and CIDEr where they can be had."""
    from nltk.translate.nist_score import corpus_nist
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    outputs = [result["output"] for result in results]
    most = max(len(result["references"]) for result in results)
    places = [[([*result["references"], *[None] * most])[place] for result in results] for place in range(most)]
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    found = {
        "bleu": BLEU(lowercase=True, force=True).corpus_score(outputs, places).score,
        "chrf": CHRF().corpus_score(outputs, places).score,
        "rouge_l": 100
        * float(np.mean([rouge.score_multi(r["references"], r["output"])["rougeL"].fmeasure for r in results])),
        "nist": corpus_nist(
            [[tokens(text) for text in r["references"]] for r in results], [tokens(o) for o in outputs]
        ),
    }
    known = {result["sample"]: [words(text) for text in result["references"]] for result in results}
    said = {result["sample"]: [words(result["output"])] for result in results}
    if METRICS["cider"].lacks() is None:
        from pycocoevalcap.cider.cider import Cider

        found["cider"] = float(Cider().compute_score(known, said)[0])
    if METRICS["meteor"].lacks() is None:
        from pycocoevalcap.meteor.meteor import Meteor

        found["meteor"] = 100 * Meteor().compute_score(known, said)[0]
    return found


def questions(path: Path, count: int) -> Rows:
    """Rows of LLM-Adapters' data as questions with the texts of their answers."""
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8"))[:count]:
        asked, answers, *_ = row["instruction"].split("\n\n")
        choices = [answer.strip() for answer in ANSWERS.split(answers)[1:]]
        right = int(row["answer"].removeprefix("answer")) - 1
        rows.append({"question": asked.partition("question: ")[2].strip(), "choices": choices, "answer": right})
    return rows


def _listed(name: str, count: int) -> Rows:
    rows: Rows = json.loads(_shared(name).read_text(encoding="utf-8"))[:count]
    return rows


def against_harness(base: Path, rows: Rows, template: str, folder: Path) -> dict[str, Any]:
    """Our numbers and the harness's on the same rows: accuracies, and the largest difference of a log-likelihood.

    Raises:
        CannotRunError: lm-evaluation-harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise CannotRunError("lm-evaluation-harness is not installed: pip install lm-eval==0.4.13")
    prepared = prepare_rows(base, rows, folder, prompt_template=template)
    settings = EvaluateSettings(kind="choice", samples_shown=0)
    shards = shards_of(base, prepared, settings, 1, folder / "ours")
    evaluate_shard(shards[0])
    ours = results_of(shards)
    heldout = load_prepared(prepared).heldout
    asked = [
        {
            "text": template.replace("{prompt}", sample["prompt"]).rstrip(),
            "choices": sample["choices"],
            "right": sample["choices"].index(sample["references"][0]),
        }
        for sample in heldout
    ]
    theirs = _harness(base, asked, folder)
    found = measure(ours, settings.measured)
    differences = [
        abs(mine - other)
        for record, others in zip(ours, theirs["log_likelihoods"], strict=True)
        for mine, other in zip(record["log_likelihoods"], others, strict=True)
    ]
    return {
        "samples": len(ours),
        "largest_difference": max(differences),
        "ours": {name: found[name].estimate for name in ("accuracy", "accuracy_norm")},
        "harness": {"accuracy": theirs["acc"], "accuracy_norm": theirs["acc_norm"]},
    }


def _harness(base: Path, asked: Rows, folder: Path) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    file = folder / "asked.jsonl"
    _write(file, asked)
    task = {
        "task": "kasa_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    model = HFLM(pretrained=str(base), device="cpu", dtype="float32", batch_size=8)
    found: Any = simple_evaluate(model, tasks=[task], bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"]["kasa_choices"], key=lambda sample: sample["doc_id"])
    return {
        "log_likelihoods": [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples],
        "acc": float(found["results"]["kasa_choices"]["acc,none"]),
        "acc_norm": float(found["results"]["kasa_choices"]["acc_norm,none"]),
    }


def prepare_rows(base: Path, rows: Rows, folder: Path, **settings: Any) -> Path:
    """A prepared dataset whose held-out split are these rows; what trains on it would have one row."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "heldout.jsonl", rows)
    asked = next(field for field in ("question", "instruction", "prompt") if field in rows[0])
    _write(folder / "train.jsonl", [{**rows[0], asked: f"{rows[0][asked]} (again)"}])
    train, heldout = ((SourceFile(folder / f"{side}.jsonl", side),) for side in ("train", "heldout"))
    data = DataSettings(train=["train.jsonl"], max_tokens=_longest(base), chat_template=False, **settings)
    out = folder / "prepared"
    prepare_dataset(data, DataSources(train, heldout, ()), base, data.max_tokens, out, lambda done, total: None)
    return out


def _longest(base: Path) -> int:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return min(MAX_TOKENS, int(config["max_position_embeddings"]))


def shards_of(
    base: Path, prepared: Path, settings: EvaluateSettings, count: int, folder: Path
) -> list[EvaluationShard]:
    """The shards of an evaluation of the plain base in fp32, their journals in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        EvaluationShard(base, None, prepared, "fp32", settings, index, count, folder / f"{index}.jsonl")
        for index in range(count)
    ]


def results_of(shards: Sequence[EvaluationShard]) -> list[Record]:
    """Their results in the order of the samples."""
    records = [record for shard in shards for record in read_journal(shard.journal)]
    return sorted(records, key=lambda record: record["sample"])


def timed_shard(shard: EvaluationShard) -> float:
    """Seconds that a shard takes in its worker."""
    started = time.perf_counter()
    evaluate_shard(shard)
    return time.perf_counter() - started


def _difference(ours: Sequence[Record], theirs: Sequence[Record]) -> str:
    differing = [one["sample"] for one, other in zip(ours, theirs, strict=False) if one != other]
    return f"{len(ours)} and {len(theirs)} results, of which {len(differing)} differ (samples {differing[:5]})"


def _base(setting: Setting) -> Path:
    try:
        return embedded_base(BASE, setting.workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        raise CannotRunError(f"{path} is not here")
    return path


def _write(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
