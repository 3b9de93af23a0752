"""The time to make and to load an adapter, beside PEFT's KaSA: a whole model, one large weight, and a saved adapter.

As a program (`python -m benchmarks.checks.adapter_start ours|peft FOLDER`, or `weight ROWS COLUMNS`) it times one of them.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kasa
from benchmarks.core import Measurement, Setting, check
from benchmarks.inputs import SEQUENCE_TOKENS, SMOLLM2_LAYERS, base_of
from benchmarks.timing import answer_of, seconds_of, start_module
from kasa import KasaConfig, ModelWeights, attach, compute_spectra, find_targets
from kasa.peft_kasa import export_peft_kasa
from kasa.spectra import bottom_triplets
from pipeline.models.loading import load_base
from tests.support.interchange import difference, random_adapter

RANK = 16
REPEATS, LOADS = 3, 5
BATCH = 4
# Shape -> how many times faster than torch.linalg.svd a weight of it must be.
LARGE = {(4096, 4096): 5.0, (4096, 11008): 10.0}
# The part of each whose product with its own transpose cannot be avoided: how many times its time may be taken.
MOST_PRODUCTS = 2.5
# Bases of the planted spectrum, like those of trained weights: a long slope, and a bottom without a gap.
SPECTRUM_TOP, SPECTRUM_BOTTOM = 3.0, 0.003
# The paper's rule, which alone PEFT knows, takes SmolLM2 apart and amplifies rounding (docs/decisions.md).
SAME_LOGITS = 1e-2


@check(bar=8, direction="at least", unit="times as fast")
def spectra_model(setting: Setting) -> Measurement:
    """SmolLM2-135M made a KaSA model of rank 16, 210 weights: spectra and adapter, against PEFT's construction, same cores."""
    base = base_of(setting.workspace)
    pairs = []
    for _ in range(REPEATS):
        ours = _timed("ours", base.folder, one_thread=False)
        theirs = _timed("peft", base.folder, one_thread=False)
        pairs.append({"kasa": ours, "peft": theirs})
    ratios = [pair["peft"]["seconds"] / pair["kasa"]["seconds"] for pair in pairs]
    weights = pairs[0]["kasa"]["weights"]
    flaws = () if weights == SMOLLM2_LAYERS else (f"{weights} weights, not {SMOLLM2_LAYERS}",)
    return Measurement(statistics.median(ratios), {"rank": RANK, "ratios": ratios, "pairs": pairs}, flaws=flaws)


@check(bar=1, direction="at least", unit="of the bars", judges="the worst of six bars")
def spectra_weight(setting: Setting) -> Measurement:
    """One weight of 4096 x 4096 and of 4096 x 11008, rank 16, one thread: at least 5 and 10 times as fast as torch's SVD
    in fp32, in at most 2.5 times the product W W^T in fp64, and more accurate."""
    details: dict[str, Any] = {}
    shares: list[float] = []
    for (rows, columns), bar in LARGE.items():
        found = _timed("weight", rows, columns, one_thread=True)
        found["times_as_fast"] = found["svd_seconds"] / found["seconds"]
        found["products"] = found["seconds"] / found["product_seconds"]
        details[f"{rows} x {columns}"] = found
        shares += [
            found["times_as_fast"] / bar,
            MOST_PRODUCTS / found["products"],
            min(found["svd_error"] / max(found["error"], 1e-300), 1e6),
        ]
    return Measurement(min(shares), details)


@check(bar=50, direction="at least", unit="times as fast")
def adapter_load(setting: Setting) -> Measurement:
    """Loading a saved adapter of SmolLM2's 210 layers at r=16 onto the loaded base, against PEFT's reload of its KaSA."""
    from peft import PeftModel

    base = base_of(setting.workspace)
    ours, theirs = setting.scratch / "adapter-load", setting.scratch / "adapter-load-peft"
    kasa.save_adapter(ours, adapter := random_adapter(base, "weight"))
    export_peft_kasa(adapter, theirs)
    plain = load_base(base.folder, "fp32")

    def load_ours(model: nn.Module) -> nn.Module:
        kasa.attach_saved(model, kasa.read_adapter(ours))
        return model

    # One reload of PEFT's stands for all: its full SVDs take seconds, and a repetition tells nothing new.
    peft_seconds, reloaded = seconds_of(PeftModel.from_pretrained, copy.deepcopy(plain), str(theirs))
    our_seconds, loaded = zip(*(seconds_of(load_ours, copy.deepcopy(plain)) for _ in range(LOADS)), strict=True)
    tokens = torch.arange(BATCH * SEQUENCE_TOKENS).view(BATCH, -1)
    with torch.no_grad():
        logits, peft_logits = (model(input_ids=tokens).logits for model in (loaded[-1], reloaded))
    apart = difference([logits], [peft_logits])
    files = [file for file in ours.iterdir() if file.is_file()]
    read_seconds, _ = seconds_of(lambda: [file.read_bytes() for file in files])
    details = {
        "peft_seconds": peft_seconds,
        "seconds": list(our_seconds),
        "reading_the_files_alone_seconds": read_seconds,
        "mebibytes": sum(file.stat().st_size for file in files) / 2**20,
        "logits_apart": apart,
        "threads": torch.get_num_threads(),
    }
    flaws = () if apart <= SAME_LOGITS else (f"the logits lie {apart:.1e} apart",)
    return Measurement(peft_seconds / statistics.median(our_seconds), details, flaws=flaws)


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

    seconds, facts = seconds_of(construct)
    return {"weights": len(targets), "seconds": seconds, **facts}


def time_peft(folder: Path, limit: int | None = None) -> dict[str, Any]:
    """The same by PEFT, which decomposes every weight wholly."""
    from peft import KasaConfig as PeftKasa
    from peft import LoraConfig, get_peft_model

    model = load_base(folder, "fp32")
    names = [target.name for target in find_targets(model, "all-linear")[:limit]]
    config = LoraConfig(r=RANK, target_modules=names, kasa_config=PeftKasa())
    seconds, _ = seconds_of(get_peft_model, model, config)
    return {"weights": len(names), "seconds": seconds, "threads": torch.get_num_threads()}


def time_weight(rows: int, columns: int) -> dict[str, Any]:
    """One weight of known singular values and vectors, stored in fp32.

    Returns:
        Seconds, and what each method drops too much or beside the mark, relative to the part that should be dropped.
    """
    weight_OI, exact_OI = planted(rows, columns)
    weight64 = weight_OI.double().numpy()
    # By numpy, whose BLAS computes one half (dsyrk).
    product_seconds, _ = seconds_of(lambda: weight64 @ weight64.T)
    seconds, triplets = seconds_of(bottom_triplets, weight_OI, RANK)
    error = _error(torch.matmul(*(factor.double() for factor in triplets.dropped_factors(RANK))), exact_OI)
    svd_seconds, (left, values, right) = seconds_of(torch.linalg.svd, weight_OI, full_matrices=False)
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


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def _error(dropped: torch.Tensor, exact: torch.Tensor) -> float:
    return float((dropped - exact).norm() / exact.norm())


def _timed(*arguments: Any, one_thread: bool) -> dict[str, Any]:
    return answer_of(start_module("benchmarks.checks.adapter_start", *arguments, one_thread=one_thread))


def main(what: str, *arguments: str) -> dict[str, Any]:
    """What `_timed` asks for."""
    if what == "weight":
        torch.set_num_threads(1)
        return time_weight(int(arguments[0]), int(arguments[1]))
    return (time_ours if what == "ours" else time_peft)(Path(arguments[0]))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
