"""KaSA: Knowledge-aware Singular-value Adaptation (arXiv 2412.06071), without harm to the base model.

targets = find_targets(model, "all-linear")
spectra = compute_spectra(ModelWeights(model), targets, rank=8)
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
from kasa.calibration import CalibrationSums, StoredCalibration, observe_layers, save_sums
from kasa.checkpoint import CheckpointWeights, weight_digest
from kasa.config import KasaConfig
from kasa.errors import AdapterFileError, InterchangeError, KasaError, SpectrumError, TargetError
from kasa.layer import KasaLayer, KasaUpdate
from kasa.lora_export import export_lora, lora_rank, vllm_rank
from kasa.merge import merge
from kasa.model_spectra import ModelWeights, WeightSource, compute_spectra
from kasa.peft_kasa import export_peft_kasa, import_peft_kasa
from kasa.regulariser import Penalty, penalty
from kasa.spectra import BottomTriplets, Spectra, bottom_triplets
from kasa.spectra_file import load_spectra, save_spectra
from kasa.targets import Target, check_rank, find_targets
from kasa.truncation import CALIBRATED, Truncation, dropped_rank
from kasa.update import product_singular_values
from kasa.weighting import Weighting

__all__ = [
    "CALIBRATED",
    "AdapterFileError",
    "BottomTriplets",
    "CalibrationSums",
    "CheckpointWeights",
    "InterchangeError",
    "KasaConfig",
    "KasaError",
    "KasaLayer",
    "KasaUpdate",
    "ModelWeights",
    "OutputShares",
    "Penalty",
    "SavedAdapter",
    "Spectra",
    "SpectrumError",
    "StoredCalibration",
    "Target",
    "TargetError",
    "Truncation",
    "WeightSource",
    "Weighting",
    "activate",
    "adapted_layers",
    "adapter_names",
    "attach",
    "attach_saved",
    "bottom_triplets",
    "check_base",
    "check_rank",
    "compute_spectra",
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
    "observe_layers",
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
