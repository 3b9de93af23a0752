"""Spectra on disk: the bottom triplets of every target weight, each tied to its weight by digest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from kasa.folders import read_tensor_folder, write_tensor_folder
from kasa.spectra import Triplets

SPECTRA_JSON = "spectra.json"


def save_spectra(folder: Path, spectra: Mapping[str, Triplets], digests: Mapping[str, str]) -> None:
    """Write the triplets of each layer; `digests` are those of the weights they were computed from."""
    tensors: dict[str, torch.Tensor] = {}
    weights = {}
    for name, triplets in spectra.items():
        tensors[f"{name}.left"] = triplets.left_OR
        tensors[f"{name}.singular_values"] = triplets.singular_values_R
        tensors[f"{name}.right"] = triplets.right_RI
        weights[name] = {
            "digest": digests[name],
            "largest": triplets.largest,
            "residual": triplets.residual,
            "orthogonality": triplets.orthogonality,
            "method": triplets.method,
        }
    write_tensor_folder(folder, SPECTRA_JSON, {"format": 1, "weights": weights}, tensors)


def load_spectra(folder: Path) -> tuple[dict[str, Triplets], dict[str, str]]:
    """The triplets and the weight digests, by layer name.

    Raises:
        AdapterFileError: the folder is incomplete or damaged.
    """
    facts, tensors = read_tensor_folder(folder, SPECTRA_JSON)
    spectra = {
        name: Triplets(
            left_OR=tensors[f"{name}.left"],
            singular_values_R=tensors[f"{name}.singular_values"],
            right_RI=tensors[f"{name}.right"],
            largest=weight["largest"],
            residual=weight["residual"],
            orthogonality=weight["orthogonality"],
            method=weight["method"],
        )
        for name, weight in facts["weights"].items()
    }
    return spectra, {name: weight["digest"] for name, weight in facts["weights"].items()}
