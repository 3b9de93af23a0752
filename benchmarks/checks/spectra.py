"""The spectra of a whole model: `kasa.bottom_triplets` against the full SVD it stands in for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.core import ROOT, CannotRunError, Measurement, Setting, check
from kasa import KasaError, bottom_triplets
from pipeline.base_model import find_base
from pipeline.recipe import BaseSettings

RANK = 16
EXPECTED_WEIGHTS = 210


@check(bar=2, direction="at least", unit="times as fast")
def spectra_model(setting: Setting) -> Measurement:
    """The 16 smallest singular triplets of the base's 210 weights, against a full SVD of each (torch, fp32, one thread)."""
    try:
        find_base(BaseSettings(), setting.workspace)
    except KasaError as error:
        raise CannotRunError(str(error)) from None
    # The BLAS libraries read their number of threads when they are loaded: a process of its own, with the limit set.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-m", "benchmarks.checks.spectra", str(setting.workspace)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=True
    )
    return ratio_of(json.loads(done.stdout))


def ratio_of(timed: dict[str, Any]) -> Measurement:
    """How many times faster the triplets are than the full SVD."""
    flaws = () if timed["weights"] == EXPECTED_WEIGHTS else (f"{timed['weights']} weights, not {EXPECTED_WEIGHTS}",)
    return Measurement(timed["svd_seconds"] / timed["triplets_seconds"], timed, flaws=flaws)


def time_model(workspace: Path, limit: int | None = None) -> dict[str, Any]:
    """Seconds for all linear weights (or the first `limit`) by either method, weight by weight, so that a change in the
    machine's speed meets both alike."""
    torch.set_num_threads(1)
    base = find_base(BaseSettings(), workspace)
    assert base is not None
    weights, targets = base.weights, base.targets("all-linear")[:limit]
    svd_seconds = triplets_seconds = worst_residual = 0.0
    methods: dict[str, int] = {}
    for target in targets:
        weight_OI = weights.weight(target)
        # Reading and widening are no part of the SVD's time; bottom_triplets widens within its own.
        svd_seconds += _seconds(torch.linalg.svd, weight_OI.float(), full_matrices=False)[0]
        seconds, triplets = _seconds(bottom_triplets, weight_OI, RANK, target.name)
        triplets_seconds += seconds
        worst_residual = max(worst_residual, triplets.residual)
        methods[triplets.method] = methods.get(triplets.method, 0) + 1
    return {
        "weights": len(targets),
        "rank": RANK,
        "triplets_seconds": triplets_seconds,
        "svd_seconds": svd_seconds,
        "worst_residual": worst_residual,
        "methods": methods,
    }


def _seconds(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - started, result


if __name__ == "__main__":
    print(json.dumps(time_model(Path(sys.argv[1]))))
