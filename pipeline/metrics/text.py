"""Generated texts against their references, one or several for each sample.

All but NIST (unbounded) and CIDEr (0 to 10) run from 0 to 100. Tokens are those of mteval-v13a (sacrebleu's `13a`), in lower
case. Beside the official scorer of the E2E challenge (github.com/tuetschek/e2e-metrics):

| metric | implementation | against the official scorer |
|---|---|---|
| BLEU | sacrebleu, corpus BLEU-4, closest reference length | the same, but for a corpus without any match of some order |
| NIST | NIST-5 as nltk's `corpus_nist` defines it | that merges the references' counts and takes their mean length; here the best one counts, order by order |
| METEOR | the METEOR 1.5 jar, as in pycocoevalcap | the same, but for the tokens: words without punctuation here, Stanford's PTB tokens there |
| CIDEr | pycocoevalcap's CIDEr-D | as METEOR; document frequencies come from the references of all held-out samples |
| ROUGE-L | rouge-score's F-measure with stemming, best reference, mean over samples | coco-caption's: no stemming, beta 1.2, best precision and best recall of different references |
| chrF | sacrebleu's corpus chrF, order 6, beta 2, case kept | not among its metrics |

Legend: N = samples, S = statistics of one metric, R = resamples, O = n-gram orders, M = METEOR's matchers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

import numpy as np

from pipeline.metrics import meteor
from pipeline.metrics.caption_tools import lacks_meteor, lacks_package
from pipeline.metrics.metric import Floats, Metric, SampleResult, mean_of, ratio

_NIST_ORDERS = 5
# As coco-caption's tokenizer drops them.
_PUNCTUATION = frozenset(["'", '"', "`", "``", "''", "(", ")", "[", "]", "{", "}", ".", "?", "!", ",", ":", "-", "--", "...", ";"])  # fmt: skip


def _rouge_l(results: Sequence[SampleResult]) -> Floats:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(reference, result["output"])["rougeL"].fmeasure for reference in result["references"])
        for result in results
    ]
    return np.array([(100 * score, 1.0) for score in best])


def _sacrebleu_statistics(make: Callable[[], Any]) -> Callable[[Sequence[SampleResult]], Floats]:
    """The counts that sacrebleu itself adds up over a corpus."""

    def statistics(results: Sequence[SampleResult]) -> Floats:
        # One list for each reference's place; None where a sample has fewer.
        places = [list(place) for place in zip_longest(*(result["references"] for result in results))]
        counts = make()._extract_corpus_statistics([result["output"] for result in results], places)
        return np.array(counts, dtype=np.float64)

    return statistics


def _sacrebleu_value(make: Callable[[], Any]) -> Callable[[Floats], Floats]:
    def value(sums: Floats) -> Floats:
        scorer = make()
        rows = sums.reshape(-1, sums.shape[-1])
        scores = [scorer._compute_score_from_stats([int(count) for count in row]).score for row in rows]
        return np.array(scores).reshape(sums.shape[:-1])

    return value


def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    # `force`: E2E's texts come tokenised, and sacrebleu would warn of that.
    return BLEU(tokenize="13a", lowercase=True, force=True)


def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def tokens(text: str) -> list[str]:
    """Lower-case tokens as mteval-v13a splits them."""
    return str(_tokenizer()(text.lower())).split()


def words(text: str) -> str:
    """The tokens that are no punctuation, with a space between."""
    return " ".join(token for token in tokens(text) if token not in _PUNCTUATION)


@cache
def _tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def _nist(results: Sequence[SampleResult]) -> Floats:
    """(N, 2 O + 2): matched information and n-grams by order, then lengths of the best references and of the output."""
    references = [[tokens(reference) for reference in result["references"]] for result in results]
    weights = _information(reference for several in references for reference in several)
    rows = []
    for result, several in zip(results, references, strict=True):
        output = tokens(result["output"])
        best = [_best_match(output, several, order, weights) for order in range(1, _NIST_ORDERS + 1)]
        lengths = sum(length for _, _, length in best), _NIST_ORDERS * len(output)
        rows.append([*(found for found, _, _ in best), *(count for _, count, _ in best), *lengths])
    return np.array(rows, dtype=np.float64)


def _best_match(
    output: list[str], references: Sequence[list[str]], order: int, weights: dict[tuple[str, ...], float]
) -> tuple[float, int, int]:
    """(information matched, n-grams of the output, length) of the reference with the most; the longer one of equals."""
    own = Counter(_ngrams(output, order))
    matched = (
        (sum(weights[ngram] * count for ngram, count in (own & Counter(_ngrams(reference, order))).items()), reference)
        for reference in references
    )
    information, length = max((found, len(reference)) for found, reference in matched)
    return information, own.total(), length


def _information(references: Iterator[list[str]]) -> dict[tuple[str, ...], float]:
    """log2(count(w_1 .. w_n-1) / count(w_1 .. w_n)) over all references (Doddington 2002, equation 2)."""
    counts: Counter[tuple[str, ...]] = Counter()
    total = 0
    for reference in references:
        total += len(reference)
        for order in range(1, _NIST_ORDERS + 1):
            counts.update(_ngrams(reference, order))
    return {ngram: math.log2((counts[ngram[:-1]] if ngram[:-1] else total) / count) for ngram, count in counts.items()}


def _ngrams(text: list[str], order: int) -> Iterator[tuple[str, ...]]:
    return zip(*(text[start:] for start in range(order)), strict=False)


def _nist_value(sums: Floats) -> Floats:
    """Mean information by order, summed, times a penalty that is 1/2 at two thirds of the references' length."""
    information_O, counts_O = sums[..., :_NIST_ORDERS], sums[..., _NIST_ORDERS : 2 * _NIST_ORDERS]
    precision = (information_O / np.maximum(counts_O, 1)).sum(axis=-1)
    shortness = np.clip(sums[..., -1] / np.maximum(sums[..., -2], 1), 1e-12, 1)
    return precision * np.exp(math.log(0.5) * (np.log(shortness) / math.log(1.5)) ** 2)


def _cider(results: Sequence[SampleResult]) -> Floats:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    for result in results:
        scorer += (words(result["output"]), [words(reference) for reference in result["references"]])
    _, scores = scorer.compute_score()
    return np.stack([scores, np.ones(len(scores))], axis=1)


def _meteor(results: Sequence[SampleResult]) -> Floats:
    pairs = [(words(result["output"]), [words(reference) for reference in result["references"]]) for result in results]
    return meteor.statistics(pairs)


TEXT_METRICS = (
    Metric("bleu", "BLEU", _sacrebleu_statistics(_bleu), _sacrebleu_value(_bleu), best=100),
    Metric("nist", "NIST", _nist, _nist_value),
    Metric("meteor", "METEOR", _meteor, meteor.value, best=100, lacks=lacks_meteor),
    Metric("rouge_l", "ROUGE-L", _rouge_l, ratio, best=100),
    Metric("cider", "CIDEr", _cider, ratio, best=10, lacks=lacks_package),
    Metric("chrf", "chrF", _sacrebleu_statistics(_chrf), _sacrebleu_value(_chrf), best=100),
    Metric("exact_match", "Exact match", mean_of("exact_match"), ratio, best=1),
)
