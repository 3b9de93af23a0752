"""KaSA as a method of the training stage, and what training did to each weight, in singular values, for the report.

The method itself is the package `kasa`.

Legend: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from kasa import (
    CheckpointWeights,
    KasaConfig,
    adapted_layers,
    attach,
    attach_saved,
    penalty,
    read_adapter,
    save_adapter,
)
from kasa.adapter import frozen_factors, trainable_parameters
from kasa.adapter_file import SavedAdapter
from kasa.checkpoint import weight_digest
from kasa.spectra_file import load_spectra
from kasa.targets import Target
from kasa.truncation import dropped_rank
from kasa.update import product_singular_values
from pipeline.core.errors import TrainingError
from pipeline.methods.method import Adapted, Tensors
from pipeline.models.prompting import LANGUAGE_MODEL, Head

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe
    from pipeline.models.base import BaseModel


@dataclass(frozen=True)
class KasaMethod:
    """A new adapter, or one to warm-start from.

    Attributes:
        base_name, base_folder: the base, for the adapter's record.
        spectra: folder of the spectra; None where nothing is dropped.
        start: folder of the adapter to warm-start from, which also holds what it drops; None for a new adapter.
    """

    base_name: str
    base_folder: Path
    targets: tuple[Target, ...]
    config: KasaConfig
    spectra: Path | None
    start: Path | None = None

    def attach(
        self, model: nn.Module, seed: int, steps: int, modules_to_save: Sequence[str] = (), head: Head = LANGUAGE_MODEL
    ) -> Adapted:
        """See `Method.attach`."""
        start, digests = self._start(model, seed, modules_to_save, head)
        layers = adapted_layers(model).values()
        own = trainable_parameters(model)
        # Copies: when the engine starts, ZeRO stage 3 partitions these tensors and leaves them empty.
        dropped = {name: factor.detach().clone() for name, factor in frozen_factors(model).items()}
        fixed = {name: tensor.detach().clone() for name, tensor in own.items() if not tensor.requires_grad}

        def penalties() -> dict[str, torch.Tensor]:
            found = penalty(layers, self.config.regulariser)
            return {
                "singular_value_penalty": self.config.singular_value_weight * found.singular_value,
                "orthogonality_penalty": self.config.orthogonality_weight * found.orthogonality,
            }

        def save(folder: Path, values: Tensors) -> None:
            tensors = {name: values[name] if name in values else fixed[name] for name in own}
            save_adapter(
                folder,
                SavedAdapter(
                    self.config, self.targets, self.base_name, digests, tensors, dropped, tuple(modules_to_save)
                ),
            )

        parameters = {name: tensor for name, tensor in own.items() if tensor.requires_grad}
        return Adapted(parameters, save, penalties, start)

    def _start(
        self, model: nn.Module, seed: int, modules_to_save: Sequence[str], head: Head
    ) -> tuple[Tensors | None, dict[str, str]]:
        """Attach the adapter.

        Returns:
            The values to warm-start from, if any, and the digests of the adapted weights by target.
        """
        if self.start is not None:
            if (theirs := Head.load(self.start)) != head:
                raise TrainingError(
                    f"the champion answers with {', '.join(theirs.classes) or theirs.kind}, and the data now has "
                    f"{', '.join(head.classes) or head.kind}; train with train.start: scratch"
                )
            # The saved configuration is the earlier training's; dropout and regularisers are those of this one.
            saved = dataclasses.replace(read_adapter(self.start), config=self.config)
            attach_saved(model, saved)
            return saved.tensors, saved.weight_digests
        if self.spectra is not None:
            spectra, digests = load_spectra(self.spectra)
        else:
            weights = CheckpointWeights(self.base_folder)
            spectra, digests = {}, {target.name: weight_digest(weights.weight(target)) for target in self.targets}
        attach(model, self.targets, self.config, spectra, seed, trained_modules=modules_to_save)
        return None, digests


def build(
    recipe: Recipe, base: BaseModel, targets: tuple[Target, ...], spectra: Path | None, start: Path | None
) -> KasaMethod:
    """See `pipeline.methods.method`."""
    return KasaMethod(base.name, base.folder, targets, recipe.kasa_config, spectra, start)


def write_layers(file: Path, adapter: Path, spectra: Path | None) -> None:
    """Write a JSON list with `name`, `learned`, `dropped` and `largest` of each layer, as in `pipeline.report.facts.LayerFacts`.

    Args:
        file: the JSON file to write.
        adapter: folder of the trained KaSA adapter.
        spectra: folder of the spectra that it was started from; None where it drops nothing.
    """
    trained = read_adapter(adapter)
    decomposed = load_spectra(spectra)[0] if spectra else {}
    config, layers = trained.config, []
    for target in trained.targets:
        a_RI, d_R, b_OR = (trained.tensors[f"{target.name}.{part}"] for part in ("a", "d", "b"))
        spectrum = decomposed.get(target.name)
        rank = dropped_rank(target, config.truncation, config.dropped_rank)
        layers.append(
            {
                "name": target.name,
                "learned": product_singular_values(config.scale * b_OR * d_R, a_RI),
                "dropped": product_singular_values(*spectrum.dropped_factors(rank)) if spectrum else [],
                "largest": spectrum.largest if spectrum else None,
            }
        )
    file.write_text(json.dumps(layers), encoding="utf-8")
