"""The time that the spectra take: a whole model against PEFT's KaSA, and one large weight against a full SVD."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.core import ROOT, CannotRunError, Measurement, Setting, check
from kasa import KasaConfig, KasaError, ModelWeights, attach, compute_spectra, find_targets
from kasa.spectra import bottom_triplets
from pipeline.config.settings import BaseSettings
from pipeline.models.base import find_base
from pipeline.models.loading import load_base

RANK = 16
EXPECTED_WEIGHTS = 210
REPEATS = 3
# Shape -> how many times faster than torch.linalg.svd a weight of it must be.
LARGE = {(4096, 4096): 5.0, (4096, 11008): 10.0}
# The part of each whose product with its own transpose cannot be avoided: how many times its time may be taken.
MOST_PRODUCTS = 2.5
# Bases of the planted spectrum, like those of trained weights: a long slope, and a bottom without a gap.
SPECTRUM_TOP, SPECTRUM_BOTTOM = 3.0, 0.003


@check(bar=8, direction="at least", unit="times as fast")
def spectra_model(setting: Setting) -> Measurement:
    """SmolLM2-135M made a KaSA model of rank 16, 210 weights: spectra and adapter, against PEFT's construction, same cores."""
    try:
        import peft  # noqa: F401  (a development dependency)

        base = find_base(BaseSettings(), setting.workspace)
    except (KasaError, ImportError) as error:
        raise CannotRunError(str(error)) from None
    assert base is not None
    pairs = []
    for _ in range(REPEATS):
        ours = _in_process("ours", base.folder, one_thread=False)
        theirs = _in_process("peft", base.folder, one_thread=False)
        pairs.append({"kasa": ours, "peft": theirs})
    ratios = [pair["peft"]["seconds"] / pair["kasa"]["seconds"] for pair in pairs]
    weights = pairs[0]["kasa"]["weights"]
    flaws = () if weights == EXPECTED_WEIGHTS else (f"{weights} weights, not {EXPECTED_WEIGHTS}",)
    return Measurement(statistics.median(ratios), {"rank": RANK, "ratios": ratios, "pairs": pairs}, flaws=flaws)


@check(bar=1, direction="at least", unit="of the bars", judges="the worst of six bars")
def spectra_weight(setting: Setting) -> Measurement:
    """One weight of 4096 x 4096 and of 4096 x 11008, rank 16, one thread: at least 5 and 10 times as fast as torch's SVD
    in fp32, in at most 2.5 times the product W W^T in fp64, and more accurate."""
    details: dict[str, Any] = {}
    shares: list[float] = []
    for (rows, columns), bar in LARGE.items():
        found = _in_process("weight", rows, columns, one_thread=True)
        found["times_as_fast"] = found["svd_seconds"] / found["seconds"]
        found["products"] = found["seconds"] / found["product_seconds"]
        details[f"{rows} x {columns}"] = found
        shares += [
            found["times_as_fast"] / bar,
            MOST_PRODUCTS / found["products"],
            min(found["svd_error"] / max(found["error"], 1e-300), 1e6),
        ]
    return Measurement(min(shares), details)


def _in_process(*arguments: Any, one_thread: bool) -> dict[str, Any]:
    """What this module, as a program, prints. The BLAS libraries read their number of threads when they are loaded."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= dict.fromkeys(names, "1") if one_thread else {}
    command = [sys.executable, "-m", "benchmarks.checks.spectra", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def time_ours(folder: Path, limit: int | None = None) -> dict[str, Any]:
    """Seconds from a loaded model to one with an adapter (or with the first `limit` weights adapted)."""
    model = load_base(folder, "fp32")
    targets = find_targets(model, "all-linear")[:limit]

    def construct() -> dict[str, Any]:
        spectra = compute_spectra(ModelWeights(model), targets, RANK)
        attach(model, targets, KasaConfig(rank=RANK, truncation="weight", dropped_rank=RANK), spectra)
        methods = [triplets.method for triplets in spectra.values()]
        return {
            "methods": {method: methods.count(method) for method in sorted(set(methods))},
            "worst_residual": max(triplets.residual for triplets in spectra.values()),
        }

    seconds, facts = _seconds(construct)
    return {"weights": len(targets), "seconds": seconds, **facts}


def time_peft(folder: Path, limit: int | None = None) -> dict[str, Any]:
    """The same by PEFT, which decomposes every weight wholly."""
    from peft import KasaConfig as PeftKasa
    from peft import LoraConfig, get_peft_model

    model = load_base(folder, "fp32")
    names = [target.name for target in find_targets(model, "all-linear")[:limit]]
    config = LoraConfig(r=RANK, target_modules=names, kasa_config=PeftKasa())
    seconds, _ = _seconds(get_peft_model, model, config)
    return {"weights": len(names), "seconds": seconds, "threads": torch.get_num_threads()}


def time_weight(rows: int, columns: int) -> dict[str, Any]:
    """One weight of known singular values and vectors, stored in fp32: seconds, and what each method drops too much or beside
    the mark, relative to the part that should be dropped."""
    weight_OI, exact_OI = planted(rows, columns)
    product_seconds, _ = _seconds(_product_with_transpose, weight_OI.double().numpy())
    seconds, triplets = _seconds(bottom_triplets, weight_OI, RANK)
    error = _error(torch.matmul(*(factor.double() for factor in triplets.dropped_factors(RANK))), exact_OI)
    svd_seconds, (left, values, right) = _seconds(torch.linalg.svd, weight_OI, full_matrices=False)
    dropped_OI = (left[:, -RANK:].double() * values[-RANK:].double()) @ right[-RANK:].double()
    return {
        "method": triplets.method,
        "seconds": seconds,
        "product_seconds": product_seconds,
        "svd_seconds": svd_seconds,
        "error": error,
        "svd_error": _error(dropped_OI, exact_OI),
    }


def planted(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in fp32 and the sum of its `RANK` smallest singular triplets in fp64.

    The triplets are those of the unrounded weight: rounding to fp32 moves them by about 1e-7 of the weight's norm, for every
    method alike.
    """
    generator = torch.Generator().manual_seed(0)
    left = _orthonormal(rows, rows, generator)
    right = _orthonormal(columns, rows, generator)
    values = torch.linspace(SPECTRUM_TOP, SPECTRUM_BOTTOM, rows, dtype=torch.float64)
    weight = (left * values) @ right.T
    exact = (left[:, -RANK:] * values[-RANK:]) @ right[:, -RANK:].T
    return weight.float(), exact


def _product_with_transpose(matrix: Any) -> Any:
    """By numpy, whose BLAS computes one half (dsyrk)."""
    return matrix @ matrix.T


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def _error(dropped: torch.Tensor, exact: torch.Tensor) -> float:
    return float((dropped - exact).norm() / exact.norm())


def _seconds(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - started, result


def main(what: str, *arguments: str) -> dict[str, Any]:
    """What `_in_process` asks for."""
    if what == "weight":
        torch.set_num_threads(1)
        return time_weight(int(arguments[0]), int(arguments[1]))
    return (time_ours if what == "ours" else time_peft)(Path(arguments[0]))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
