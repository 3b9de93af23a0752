"""KaSA: Knowledge-aware Singular-value Adaptation (arXiv 2412.06071), without harm to the base model.

targets = find_targets(model, "all-linear")
spectra = {t.name: bottom_triplets(model.get_submodule(t.name).weight, rank=8) for t in targets}
layers = attach(model, targets, KasaConfig(rank=8), spectra)
loss = task_loss + penalty(layers.values(), "authors").weighted(config)
"""

from kasa.adapter import (
    activate,
    adapted_layers,
    adapter_names,
    attach,
    detach,
    disabled,
    fold,
    frozen_factors,
    load_tensors,
    trainable_parameters,
    unfold,
)
from kasa.adapter_file import SavedAdapter, attach_saved, check_base, read_adapter, save_adapter
from kasa.audit import OutputShares, observe_dropped
from kasa.calibration import InputSums, StoredCovariances, observe_inputs, save_sums
from kasa.checkpoint import CheckpointWeights, weight_digest
from kasa.config import KasaConfig
from kasa.errors import AdapterFileError, InterchangeError, KasaError, SpectrumError, TargetError
from kasa.layer import KasaLayer, KasaUpdate
from kasa.lora_export import export_lora, lora_rank, vllm_rank
from kasa.merge import merge
from kasa.peft_kasa import export_peft_kasa, import_peft_kasa
from kasa.regulariser import Penalty, penalty
from kasa.spectra import BottomTriplets, Spectra, bottom_triplets
from kasa.spectra_file import load_spectra, save_spectra
from kasa.targets import Target, check_rank, find_targets
from kasa.truncation import Truncation, dropped_rank
from kasa.update import product_singular_values

__all__ = [
    "AdapterFileError",
    "BottomTriplets",
    "CheckpointWeights",
    "InputSums",
    "InterchangeError",
    "KasaConfig",
    "KasaError",
    "KasaLayer",
    "KasaUpdate",
    "OutputShares",
    "Penalty",
    "SavedAdapter",
    "Spectra",
    "SpectrumError",
    "StoredCovariances",
    "Target",
    "TargetError",
    "Truncation",
    "activate",
    "adapted_layers",
    "adapter_names",
    "attach",
    "attach_saved",
    "bottom_triplets",
    "check_base",
    "check_rank",
    "detach",
    "disabled",
    "dropped_rank",
    "export_lora",
    "export_peft_kasa",
    "find_targets",
    "fold",
    "frozen_factors",
    "import_peft_kasa",
    "load_spectra",
    "load_tensors",
    "lora_rank",
    "merge",
    "observe_dropped",
    "observe_inputs",
    "penalty",
    "product_singular_values",
    "read_adapter",
    "save_adapter",
    "save_spectra",
    "save_sums",
    "trainable_parameters",
    "unfold",
    "vllm_rank",
    "weight_digest",
]
