"""KaSA: Knowledge-aware Singular-value Adaptation (arXiv 2412.06071), without harm to the base model.

targets = find_targets(model, "all-linear")
spectra = compute_spectra(ModelWeights(model), targets, rank=8)
layers = attach(model, targets, KasaConfig(rank=8), spectra)
loss = task_loss + penalty(layers.values(), "authors").weighted(config)
"""

from kasa.adapter import activate, adapted_layers, attach, detach, disabled, fold, unfold
from kasa.adapter_file import attach_saved, capture_adapter, read_adapter, save_adapter
from kasa.calibration import observe_layers
from kasa.checkpoint import CheckpointWeights
from kasa.config import KasaConfig
from kasa.errors import KasaError
from kasa.lora_export import export_lora
from kasa.merge import merge
from kasa.model_spectra import ModelWeights, compute_spectra
from kasa.regulariser import penalty
from kasa.targets import find_targets

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
