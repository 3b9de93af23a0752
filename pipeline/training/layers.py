"""Singular values of what training added to each weight, beside those of what truncation took from it, for the report.

Legend: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import json
from pathlib import Path

from kasa import read_adapter
from kasa.spectra_file import load_spectra
from kasa.truncation import dropped_rank
from kasa.update import product_singular_values


def write_layers(file: Path, adapter: Path, spectra: Path) -> None:
    """Write a JSON list with `name`, `learned`, `dropped` and `largest` of each layer, as in `pipeline.report.facts.LayerFacts`.

    Args:
        file: the JSON file to write.
        adapter: folder of the trained KaSA adapter.
        spectra: folder of the spectra that it was started from.
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
