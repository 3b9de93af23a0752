"""Text metrics against the libraries that define them, on several references to a sample."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from nltk.translate.nist_score import corpus_nist
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from pipeline.config.recipe import Recipe
from pipeline.core.errors import RecipeError
from pipeline.metrics import catalogue
from pipeline.metrics.catalogue import METRICS, check_measurable
from pipeline.metrics.intervals import measure
from pipeline.metrics.metric import Metric, mean_of, ratio
from pipeline.metrics.text import tokens, words

SENTENCES = [
    "Blue Spice is a coffee shop in the city centre .",
    "There is a coffee shop Blue Spice in the riverside area.",
    "The Blue Spice coffee shop, near Crowne Plaza Hotel, has a customer rating of 5 out of 5!",
    "It costs £20-25 and children aren't welcome (so they say).",
    "A family-friendly pub by the river",
    "Yes",
]


def corpus(count: int = 60, seed: int = 0) -> list[dict]:
    """Outputs that are some reference with words changed, dropped or doubled; one to four references each."""
    chance = random.Random(seed)

    def changed(text: str) -> str:
        found = text.split()
        for _ in range(chance.randrange(4)):
            place = chance.randrange(len(found))
            found[place] = chance.choice(
                ["the", "Spice", "cheap", "", found[place] * 2, f"{found[place]} {found[place]}"]
            )
        return " ".join(found)

    results = []
    for sample in range(count):
        references = [changed(chance.choice(SENTENCES)) or "x" for _ in range(chance.randint(1, 4))]
        results.append({"sample": sample, "output": changed(references[0]), "references": references})
    results[3]["output"] = ""
    return results


def value(results: list[dict], metric: str) -> float:
    return measure(results, [metric])[metric].estimate


@pytest.mark.parametrize(
    ("metric", "theirs"), [("bleu", BLEU(lowercase=True, force=True)), ("chrf", CHRF())], ids=["bleu", "chrf"]
)
def test_bleu_in_lower_case_and_chrf_are_sacrebleus(metric: str, theirs: BLEU | CHRF) -> None:
    results = corpus()
    most = max(len(result["references"]) for result in results)
    places = [[(r["references"] + [None] * most)[place] for r in results] for place in range(most)]
    score = theirs.corpus_score([r["output"] for r in results], places).score
    assert value(results, metric) == pytest.approx(score, rel=1e-12)
    assert 0 < score < 100


def test_rouge_l_is_the_mean_of_rouge_scores_best_reference() -> None:
    results, scorer = corpus(), RougeScorer(["rougeL"], use_stemmer=True)
    theirs = 100 * np.mean([scorer.score_multi(r["references"], r["output"])["rougeL"].fmeasure for r in results])
    assert value(results, "rouge_l") == pytest.approx(theirs, rel=1e-12)
    assert 0 < theirs < 100


def test_nist_is_nltks() -> None:
    results = corpus()
    theirs = corpus_nist(
        [[tokens(text) for text in r["references"]] for r in results], [tokens(r["output"]) for r in results]
    )
    assert value(results, "nist") == pytest.approx(theirs, rel=1e-12)
    # Too short on the whole: the length penalty counts.
    short = [result | {"output": " ".join(result["output"].split()[:4])} for result in results]
    theirs = corpus_nist(
        [[tokens(text) for text in r["references"]] for r in short], [tokens(r["output"]) for r in short]
    )
    assert value(short, "nist") == pytest.approx(theirs, rel=1e-12)


def test_nothing_said_scores_nothing() -> None:
    silent = [{"sample": n, "output": "", "references": ["one two"]} for n in range(3)]
    assert [value(silent, name) for name in ("bleu", "nist", "rouge_l", "chrf")] == [
        0,
        pytest.approx(0, abs=1e-9),
        0,
        0,
    ]


def test_tokens_are_those_of_mteval_and_words_have_no_punctuation() -> None:
    assert tokens(SENTENCES[2])[-10:] == ["has", "a", "customer", "rating", "of", "5", "out", "of", "5", "!"]
    assert words("The Blue Spice, near 1.5 £20-25 (it is)!") == "the blue spice near 1.5 £20 25 it is"


def test_cider_is_pycocoevalcaps() -> None:
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    results = corpus()
    theirs, _ = cider.Cider().compute_score(
        {r["sample"]: [words(text) for text in r["references"]] for r in results},
        {r["sample"]: [words(r["output"])] for r in results},
    )
    assert value(results, "cider") == pytest.approx(theirs, rel=1e-12)
    assert 0 < theirs < 10


@pytest.mark.processes
@pytest.mark.skipif(METRICS["meteor"].lacks() is not None, reason="needs Java and the extra e2e")
def test_meteor_of_samples_and_of_the_corpus_is_the_jars() -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    results = corpus()
    jar = Meteor()
    whole, each = jar.compute_score(
        {r["sample"]: [words(text) for text in r["references"]] for r in results},
        {r["sample"]: [words(r["output"])] for r in results},
    )
    jar.meteor_p.stdout.close()
    jar.meteor_p.stderr.close()
    metric = METRICS["meteor"]
    table = metric.statistics(results)
    assert metric.value(table) == pytest.approx(100 * np.array(each), rel=1e-9)
    assert float(metric.value(table.sum(axis=0))) == pytest.approx(100 * whole, rel=1e-9)


def test_what_a_metric_needs_is_asked_for_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match=r"evaluate\.metrics: meteor needs a Java runtime .*leave meteor out"):
        check_measurable(["bleu", "meteor"])
    check_measurable([name for name in catalogue.METRICS if name not in ("meteor", "cider")])


def test_a_metric_is_one_entry(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new metric needs beside its entry is nothing: a recipe can ask for it, and guard it, and it is measured."""
    with pytest.raises(RecipeError, match="there is no 'brevity' of generated text"):
        recipe({"evaluate.metrics": ["brevity"]})
    shorter = Metric("brevity", "Brevity", mean_of("length"), ratio, ("text",), by_default=False, lower_is_better=True)
    monkeypatch.setitem(METRICS, "brevity", shorter)
    assert "brevity" not in recipe().evaluate.measured
    asked = recipe({"evaluate.metrics": ["brevity"], "promotion.guards": {"brevity": 2.0}}).evaluate
    check_measurable(asked.measured)
    results = [{"sample": n, "length": n} for n in range(5)]
    assert measure(results, [name for name in asked.measured if name == "brevity"])["brevity"].estimate == 2.0
