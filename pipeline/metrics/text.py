"""Generated texts against their references, one or several for each sample.

All but NIST (unbounded) and CIDEr (0 to 10) run from 0 to 100. Tokens are those of mteval-v13a (sacrebleu's `13a`), in lower
case. Beside the official scorer of the E2E challenge (github.com/tuetschek/e2e-metrics):

| metric | implementation | against the official scorer |
|---|---|---|
| BLEU | sacrebleu, corpus BLEU-4, closest reference length | the same, but for a corpus without any match of some order |
| NIST | NIST-5 as nltk's `corpus_nist` defines it | that merges the references' counts and takes their mean length; here the best one counts, order by order |
| METEOR | the METEOR 1.5 jar that comes with pycocoevalcap | the same, but for the tokens: words without punctuation here, Stanford's PTB tokens there |
| CIDEr | pycocoevalcap's CIDEr-D | as METEOR; document frequencies come from the references of all held-out samples |
| ROUGE-L | rouge-score's F-measure with stemming, best reference, mean over samples | coco-caption's: no stemming, beta 1.2, best precision and best recall of different references |
| chrF | sacrebleu's corpus chrF, order 6, beta 2, case kept | not among its metrics |

Legend: N = samples, S = statistics of one metric, O = n-gram orders, M = METEOR's matchers (exact, stem, synonym, paraphrase).
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pipeline.metrics.metric import Floats, Metric, SampleResult, mean_of, ratio, table

# Of the extra `e2e`: CIDEr, and METEOR's jar.
_CAPTION_PACKAGE = "pycocoevalcap"

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
    return table([(100 * score, 1.0) for score in best])


def _sacrebleu_statistics(make: Callable[[], Any]) -> Callable[[Sequence[SampleResult]], Floats]:
    """The counts that sacrebleu itself adds up over a corpus."""

    def statistics(results: Sequence[SampleResult]) -> Floats:
        # One list for each reference's place; None where a sample has fewer.
        places = [list(place) for place in zip_longest(*(result["references"] for result in results))]
        return table(make()._extract_corpus_statistics([result["output"] for result in results], places))

    return statistics


def _sacrebleu_value(make: Callable[[], Any]) -> Callable[[Floats], Floats]:
    def value(sums: Floats) -> Floats:
        import numpy as np

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
    return table(rows)


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
    import numpy as np

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
    return table([(score, 1.0) for score in scores])


# English, task `rank`: what the jar takes by default.
_METEOR_ALPHA, _METEOR_BETA, _METEOR_GAMMA, _METEOR_CONTENT = 0.85, 0.2, 0.6, 0.75
_METEOR_MATCHERS_M = (1.0, 0.6, 0.8, 0.6)


def _meteor(results: Sequence[SampleResult]) -> Floats:
    """METEOR 1.5 (Denkowski and Lavie 2014): the statistics of each sample from the authors' jar; it takes the best reference.

    The jar would compute one score of one corpus. `_meteor_value` is its formula, which gives the value of every resample of
    a bootstrap from summed statistics.

    Raises:
        RuntimeError: the jar failed.
    """
    pairs = [(words(result["output"]), [words(reference) for reference in result["references"]]) for result in results]
    lines = [" ||| ".join(["SCORE", *map(_plain, references), _plain(output)]) for output, references in pairs]
    done = subprocess.run(
        ["java", "-jar", "-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"],
        cwd=_meteor_folder(),
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    if done.returncode or len(rows) != len(pairs):
        raise RuntimeError(f"METEOR's jar failed with exit code {done.returncode}: {done.stderr[-500:]}")
    table_NS = table([[float(count) for count in row] for row in rows])
    # For a sample that matches as a whole the jar reports one chunk, and counts none in its scores.
    whole = (table_NS[:, 21] == table_NS[:, 0]) & (table_NS[:, 22] == table_NS[:, 1]) & (table_NS[:, 20] == 1)
    table_NS[whole, 20] = 0
    return table_NS


def _meteor_value(sums: Floats) -> Floats:
    """(..., S) -> (...), 0 to 100: the weighted F-mean, lessened the more chunks the matches fall into."""
    import numpy as np

    output, reference, output_function, reference_function = (sums[..., place] for place in range(4))
    # By matcher: content words of output and reference, function words of both.
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    chunks, output_matches, reference_matches = (sums[..., place] for place in range(20, 23))

    def share(side: int, length: Floats, function_words: Floats) -> Floats:
        found = (np.array(_METEOR_MATCHERS_M) * _weighted(matches[..., side], matches[..., side + 2])).sum(axis=-1)
        return _over(found, _weighted(length - function_words, function_words))

    precision = share(0, output, output_function)
    recall = share(1, reference, reference_function)
    mean = _over(precision * recall, _METEOR_ALPHA * precision + (1 - _METEOR_ALPHA) * recall)
    pieces = _over(chunks, (output_matches + reference_matches) / 2)
    return 100 * mean * (1 - _METEOR_GAMMA * pieces**_METEOR_BETA)


def _weighted(content: Floats, function: Floats) -> Floats:
    return _METEOR_CONTENT * content + (1 - _METEOR_CONTENT) * function


def _over(part: Floats, whole: Floats) -> Floats:
    """The quotient; 0 where `whole` is 0."""
    import numpy as np

    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)


def _plain(text: str) -> str:
    """One line without the jar's separator."""
    return " ".join(text.replace("|||", " ").split())


def _meteor_folder() -> Path:
    """Where METEOR's jar and its data lie; the package is there (`Metric.lacks`)."""
    spec = importlib.util.find_spec(_CAPTION_PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "meteor"


TEXT_METRICS = (
    Metric("bleu", "BLEU", _sacrebleu_statistics(_bleu), _sacrebleu_value(_bleu), ("text",), best=100),
    Metric("nist", "NIST", _nist, _nist_value, ("text",), by_default=False),
    Metric(
        "meteor",
        "METEOR",
        _meteor,
        _meteor_value,
        ("text",),
        by_default=False,
        best=100,
        package=_CAPTION_PACKAGE,
        extra="e2e",
        java=True,
    ),
    Metric("rouge_l", "ROUGE-L", _rouge_l, ratio, ("text",), decides=("text",), best=100),
    Metric(
        "cider", "CIDEr", _cider, ratio, ("text",), by_default=False, best=10, package=_CAPTION_PACKAGE, extra="e2e"
    ),
    Metric("chrf", "chrF", _sacrebleu_statistics(_chrf), _sacrebleu_value(_chrf), ("text",), best=100),
    Metric(
        "exact_match", "Exact match", mean_of("exact_match"), ratio, ("text", "answer"), decides=("answer",), best=1
    ),
)
