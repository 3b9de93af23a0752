"""METEOR 1.5 (Denkowski and Lavie 2014): the statistics of each sample from the authors' jar, their value computed here.

The jar comes with pycocoevalcap (the extra `e2e`) and needs a Java runtime. It would compute one score of one corpus; from
summed statistics the same formula gives every resample of a bootstrap.

Legend: N = samples, S = the jar's 23 statistics, M = matchers (exact, stem, synonym, paraphrase).
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import numpy as np

from pipeline.metrics.caption_tools import meteor_folder
from pipeline.metrics.metric import Floats

# English, task `rank`: what the jar takes by default.
_ALPHA, _BETA, _GAMMA, _CONTENT = 0.85, 0.2, 0.6, 0.75
_MATCHERS_M = np.array([1.0, 0.6, 0.8, 0.6])


def statistics(pairs: Sequence[tuple[str, Sequence[str]]]) -> Floats:
    """(N, S) for outputs with their references; the jar takes the best reference of each.

    Raises:
        RuntimeError: the jar failed.
    """
    lines = [" ||| ".join(["SCORE", *map(_plain, references), _plain(output)]) for output, references in pairs]
    done = subprocess.run(
        ["java", "-jar", "-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"],
        cwd=meteor_folder(),
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    if done.returncode or len(rows) != len(pairs):
        raise RuntimeError(f"METEOR's jar failed with exit code {done.returncode}: {done.stderr[-500:]}")
    table_NS = np.array(rows, dtype=np.float64)
    # The jar counts no piece for a sample that matches as a whole, neither alone nor in a sum.
    whole = (table_NS[:, 21] == table_NS[:, 0]) & (table_NS[:, 22] == table_NS[:, 1]) & (table_NS[:, 20] == 1)
    table_NS[whole, 20] = 0
    return table_NS


def value(sums: Floats) -> Floats:
    """(..., S) -> (...), 0 to 100: the weighted F-mean, lessened the more pieces the matches fall into."""
    output, reference, output_function, reference_function = (sums[..., place] for place in range(4))
    # By matcher: content words of output and reference, function words of both.
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    chunks, output_matches, reference_matches = (sums[..., place] for place in range(20, 23))

    def share(side: int, length: Floats, function_words: Floats) -> Floats:
        found = (_MATCHERS_M * _weighted(matches[..., side], matches[..., side + 2])).sum(axis=-1)
        return _over(found, _weighted(length - function_words, function_words))

    precision = share(0, output, output_function)
    recall = share(1, reference, reference_function)
    mean = _over(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    pieces = _over(chunks, (output_matches + reference_matches) / 2)
    return 100 * mean * (1 - _GAMMA * pieces**_BETA)


def _weighted(content: Floats, function: Floats) -> Floats:
    return _CONTENT * content + (1 - _CONTENT) * function


def _over(part: Floats, whole: Floats) -> Floats:
    """0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)


def _plain(text: str) -> str:
    """One line without the jar's separator."""
    return " ".join(text.replace("|||", " ").split())
