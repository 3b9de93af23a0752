"""The module of a method that does not exist, for `test_new_method.py`: a LoRA that starts from the weight's first rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kasa.targets import Target
from pipeline.methods.method import Adapted
from pipeline.methods.peft import ADAPTER_NAME, PeftSettings, configuration, inject, saver
from pipeline.models.prompting import LANGUAGE_MODEL, Head


@dataclass(frozen=True)
class SpareMethod:
    settings: PeftSettings

    def attach(
        self, model: nn.Module, seed: int, steps: int, modules_to_save: Sequence[str] = (), head: Head = LANGUAGE_MODEL
    ) -> Adapted:
        config = configuration("LoraConfig", r=self.settings.rank, **self.settings.low_rank)
        wrapped, parameters = inject(model, config, seed, modules_to_save)
        for target in self.settings.targets:
            layer: Any = model.get_submodule(target.name)
            layer.lora_A[ADAPTER_NAME].weight.data = layer.get_base_layer().weight.data[: self.settings.rank].clone()
        return Adapted(parameters, saver(wrapped, self.settings.base_name, modules_to_save))


def build(recipe: Any, base: Any, targets: tuple[Target, ...], spectra: Path | None, start: Path | None) -> SpareMethod:
    return SpareMethod(PeftSettings.of(recipe, base, targets))
