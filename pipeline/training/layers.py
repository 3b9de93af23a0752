"""What training did to each adapted weight, in singular values: a few numbers a layer, for the report."""

from __future__ import annotations

import json
from pathlib import Path

from kasa import read_adapter
from kasa.spectra_file import load_spectra
from kasa.truncation import dropped_rank
from kasa.update import product_singular_values


def write_layers(file: Path, adapter: Path, spectra: Path) -> None:
    """Write a JSON list of `name`, `learned`, `dropped` and `largest` as in `pipeline.report.facts.LayerFacts`.

    Args:
        adapter, spectra: the folders of both.
    """
    trained = read_adapter(adapter)
    decomposed, _ = load_spectra(spectra)
    config, layers = trained.config, []
    for target in trained.targets:
        a_RI, d_R, b_OR = (trained.tensors[f"{target.name}.{part}"] for part in ("a", "d", "b"))
        spectrum = decomposed[target.name]
        dropped = spectrum.dropped_factors(dropped_rank(target, config.truncation, config.dropped_rank))
        layers.append(
            {
                "name": target.name,
                "learned": product_singular_values(config.scale * b_OR * d_R, a_RI),
                "dropped": product_singular_values(*dropped),
                "largest": spectrum.largest,
            }
        )
    file.write_text(json.dumps(layers), encoding="utf-8")
