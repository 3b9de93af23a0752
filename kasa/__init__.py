"""KaSA: Knowledge-aware Singular-value Adaptation (arXiv 2412.06071), without harm to the base model.

targets = find_targets(model, "all-linear")
with observe_layers(model, targets, gradients=True) as seen:
    model(**text).loss.backward()
spectra = compute_spectra(ModelWeights(model), targets, rank=8, weighting=seen.weighting)
layers = attach(model, targets, config := KasaConfig(rank=8), spectra)
loss = task_loss + penalty(layers.values(), "authors").weighted(config)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kasa.adapter import activate, adapted_layers, attach, detach, disabled, fold, unfold
    from kasa.adapter_file import attach_saved, capture_adapter, read_adapter, save_adapter
    from kasa.calibration import observe_layers
    from kasa.checkpoint import CheckpointWeights
    from kasa.config import KasaConfig
    from kasa.errors import KasaError
    from kasa.lora_export import export_lora
    from kasa.merging import merge
    from kasa.model_spectra import ModelWeights, compute_spectra
    from kasa.regulariser import penalty
    from kasa.targets import find_targets

# Where each public name lives. It is imported when it is first asked for: torch takes seconds, and a command that finds
# nothing to do, or prints its help, needs only `kasa.errors`. No module may bear the name of something listed here: once
# imported it would stand in its place.
_HOMES = {
    "activate": "adapter",
    "adapted_layers": "adapter",
    "attach": "adapter",
    "attach_saved": "adapter_file",
    "capture_adapter": "adapter_file",
    "CheckpointWeights": "checkpoint",
    "compute_spectra": "model_spectra",
    "detach": "adapter",
    "disabled": "adapter",
    "export_lora": "lora_export",
    "find_targets": "targets",
    "fold": "adapter",
    "KasaConfig": "config",
    "KasaError": "errors",
    "merge": "merging",
    "ModelWeights": "model_spectra",
    "observe_layers": "calibration",
    "penalty": "regulariser",
    "read_adapter": "adapter_file",
    "save_adapter": "adapter_file",
    "unfold": "adapter",
}

__all__ = [
    "CheckpointWeights",
    "KasaConfig",
    "KasaError",
    "ModelWeights",
    "activate",
    "adapted_layers",
    "attach",
    "attach_saved",
    "capture_adapter",
    "compute_spectra",
    "detach",
    "disabled",
    "export_lora",
    "find_targets",
    "fold",
    "merge",
    "observe_layers",
    "penalty",
    "read_adapter",
    "save_adapter",
    "unfold",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kasa' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kasa.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
