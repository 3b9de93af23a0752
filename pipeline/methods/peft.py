"""The one door to Hugging Face PEFT: the methods that differ by their configuration alone, and what methods with more of
their own build on (`pipeline.methods.residual`, `pipeline.methods.adalora`).

PEFT puts its layers into the base in place. The base itself is what is trained and called, so that labels, packing and
generation are the same for every method. What is saved is PEFT's own folder: `PeftModel.from_pretrained(base, folder)`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from kasa.errors import AdapterFileError
from kasa.interchange import PEFT_CONFIG, PEFT_PREFIX, PEFT_TENSORS, new_folder, write_peft_folder
from kasa.targets import Target, is_within, outline_of
from pipeline.core.errors import TrainingError, one_line
from pipeline.methods.method import Adapted, Tensors
from pipeline.models.prompting import LANGUAGE_MODEL, Head, head_modules

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe
    from pipeline.models.base import BaseModel

# The name that PEFT gives to an adapter, in the paths of its parameters.
ADAPTER_NAME = "default"


@dataclass(frozen=True)
class PeftSettings:
    """What a recipe says to PEFT's methods.

    Attributes:
        targets: the adapted modules.
        rank, alpha, dropout: as in the recipe's `adapter`; what a method does not know is not used.
        base_name: the base, for the adapter's record.
    """

    targets: tuple[Target, ...]
    rank: int
    alpha: float
    dropout: float
    base_name: str

    @classmethod
    def of(cls, recipe: Recipe, base: BaseModel, targets: tuple[Target, ...]) -> PeftSettings:
        """Those of a recipe."""
        adapter = recipe.adapter
        return cls(targets, adapter.rank, adapter.alpha, adapter.dropout, base.name)

    @property
    def on_targets(self) -> dict[str, Any]:
        """The arguments of every PEFT configuration that adapts the targets."""
        return {
            "target_modules": [target.name for target in self.targets],
            "fan_in_fan_out": any(target.transposed for target in self.targets),
        }

    @property
    def low_rank(self) -> dict[str, Any]:
        """The arguments of every configuration of a LoRA, but for its rank."""
        return {**self.on_targets, "lora_alpha": self.alpha, "lora_dropout": self.dropout}


def configuration(kind: str, **arguments: Any) -> Any:
    """A configuration of PEFT by the name of its class, such as `LoraConfig`."""
    return getattr(peft, kind)(**arguments)


# (settings, model, seed) -> PEFT's configuration. A method that needs no more than that is a row here and its entry in
# `pipeline.config.methods`.
_CONFIGURATIONS: Mapping[str, Callable[[PeftSettings, nn.Module, int], Any]] = {
    "lora": lambda own, model, seed: peft.LoraConfig(r=own.rank, **own.low_rank),
    "rslora": lambda own, model, seed: peft.LoraConfig(r=own.rank, use_rslora=True, **own.low_rank),
    "dora": lambda own, model, seed: peft.LoraConfig(r=own.rank, use_dora=True, **own.low_rank),
    "vera": lambda own, model, seed: peft.VeraConfig(
        r=own.rank, vera_dropout=own.dropout, projection_prng_key=seed, **own.on_targets
    ),
    "fourierft": lambda own, model, seed: peft.FourierFTConfig(
        n_frequency=own.rank, random_loc_seed=seed, **own.on_targets
    ),
    "ia3": lambda own, model, seed: peft.IA3Config(
        feedforward_modules=_feedforward_names(model, own.targets), **own.on_targets
    ),
    "layernorm": lambda own, model, seed: peft.LNTuningConfig(target_modules=norm_names(model)),
}


@dataclass(frozen=True)
class PeftMethod:
    """One of the methods in `_CONFIGURATIONS`, by its name."""

    name: str
    settings: PeftSettings

    def attach(
        self, model: nn.Module, seed: int, steps: int, modules_to_save: Sequence[str] = (), head: Head = LANGUAGE_MODEL
    ) -> Adapted:
        """See `Method.attach`."""
        config = _CONFIGURATIONS[self.name](self.settings, model, seed)
        wrapped, parameters = inject(model, config, seed, modules_to_save)
        if self.name == "vera":
            # The shared projections are buffers. DeepSpeed leaves those in fp32 where everything around them is bf16.
            for shared in (wrapped.base_model.vera_A, wrapped.base_model.vera_B):
                shared[ADAPTER_NAME] = shared[ADAPTER_NAME].to(next(model.parameters()).dtype)
        return Adapted(parameters, saver(wrapped, self.settings.base_name, modules_to_save))


def build(
    recipe: Recipe, base: BaseModel, targets: tuple[Target, ...], spectra: Path | None, start: Path | None
) -> PeftMethod:
    """See `pipeline.methods.method`."""
    return PeftMethod(recipe.adapter.method, PeftSettings.of(recipe, base, targets))


def parameter_count(name: str, targets: Sequence[Target], model: nn.Module) -> int:
    """How many numbers IA3 or the tuning of normalisation layers trains on this base."""
    if name == "layernorm":
        return sum(p.numel() for norm in norm_names(model) for p in model.get_submodule(norm).parameters())
    inputs_scaled = set(_feedforward_names(model, targets))
    return sum(target.in_features if target.name in inputs_scaled else target.out_features for target in targets)


def norm_names(model: nn.Module) -> list[str]:
    """The normalisation layers of the base without its head: the modules whose weight is a vector, which scales each feature."""
    beside = head_modules(model)
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    return [
        name
        for name, weight in weights.items()
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and weight.numel() > 1
        if not is_within(name, beside)
    ]


def _feedforward_names(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """The targets whose inputs IA3 scales, not their outputs: the last module of each feed-forward block.

    It is known by its shape: no module of its layer has a wider input, and what it makes is narrower and what others read.
    """
    inputs: dict[str, set[int]] = {}
    for one in outline_of(model).linear:
        inputs.setdefault(_layer_of(one.name), set()).add(one.in_features)
    return [
        target.name
        for target in targets
        if (layer := _layer_of(target.name))
        and target.out_features < target.in_features == max(inputs[layer])
        and target.out_features in inputs[layer]
    ]


def _layer_of(name: str) -> str:
    """The innermost numbered module that holds a module; empty where none does."""
    parts = name.split(".")
    return ".".join(parts[: max((place + 1 for place, part in enumerate(parts) if part.isdigit()), default=0)])


def inject(
    model: nn.Module, config: Any, seed: int, modules_to_save: Sequence[str]
) -> tuple[Any, dict[str, nn.Parameter]]:
    """Put PEFT's layers into a base, in place; the random generator of the caller is left as it was.

    Returns:
        PEFT's own model around the base, and all that is trained, by its name in the base.

    Raises:
        TrainingError: PEFT cannot adapt this base so.
    """
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        try:
            wrapped = peft.get_peft_model(model, config)
        except (
            ValueError,
            TypeError,
            NotImplementedError,
        ) as error:  # the last for layers that a method has no form for
            raise TrainingError(f"PEFT cannot adapt this base so: {one_line(error)}") from error
    for name in modules_to_save:
        model.get_submodule(name).requires_grad_(True)
    return wrapped, {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def saver(wrapped: Any, base_name: str, modules_to_save: Sequence[str]) -> Callable[[Path, Tensors], None]:
    """What writes PEFT's folder of the method in force, as `Adapted.save` does."""

    def save(folder: Path, values: Tensors) -> None:
        # The trained values in place of what the model holds, which the engine may have rounded to bf16.
        state = {
            name: values.get(name.removeprefix(PEFT_PREFIX), tensor) for name, tensor in wrapped.state_dict().items()
        }
        with _quiet():
            tensors = peft.get_peft_model_state_dict(wrapped, state_dict=state, save_embedding_layers=False)
        tensors |= {f"{PEFT_PREFIX}{name}": value for name, value in _within(values, modules_to_save).items()}
        config = wrapped.peft_config[ADAPTER_NAME]
        config.inference_mode, config.base_model_name_or_path = True, base_name
        config.modules_to_save = list(modules_to_save) or None
        shutil.rmtree(folder, ignore_errors=True)
        with new_folder(folder) as new:
            stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            save_file(stored, new / PEFT_TENSORS, metadata={"format": "pt"})
            config.save_pretrained(str(new))

    return save


def save_as_lora(
    folder: Path, settings: PeftSettings, rank: int, factors: Tensors, values: Tensors, modules_to_save: Sequence[str]
) -> None:
    """Write an ordinary LoRA whose scale is 1, which PEFT puts onto the untouched base.

    Args:
        rank: that of `factors`, which may differ from the one that was trained.
        factors: `<target>.lora_A.weight` of shape (rank, in) and `<target>.lora_B.weight` of shape (out, rank).
        values: the trained values, of which those of `modules_to_save` are saved beside.
    """
    config = {
        "base_model_name_or_path": settings.base_name,
        "fan_in_fan_out": settings.on_targets["fan_in_fan_out"],
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "r": rank,
        "target_modules": settings.on_targets["target_modules"],
        **({"modules_to_save": list(modules_to_save), "task_type": None} if modules_to_save else {}),
    }
    shutil.rmtree(folder, ignore_errors=True)
    write_peft_folder(folder, config, {**_within(values, modules_to_save), **factors}, {})


def load_peft_folder(model: nn.Module, folder: Path) -> Any:
    """Put an adapter that PEFT or this package saved into a loaded base, in place.

    Returns:
        PEFT's own model around the base.

    Raises:
        AdapterFileError: the folder is damaged, or made for another architecture.
    """
    _peft_settings(folder)
    try:
        with _quiet(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            wrapped = peft.PeftModel.from_pretrained(model, str(folder))
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise AdapterFileError(f"{folder} cannot be put onto this base: {one_line(error)}") from None
    for one in said:
        # PEFT only warns of tensors that the folder lacks.
        if "missing adapter keys" in str(one.message):
            raise AdapterFileError(f"{folder} is not complete: {one_line(one.message)}")
    return wrapped


def base_of_peft_folder(folder: Path) -> str:
    """The base that PEFT's configuration names.

    Raises:
        AdapterFileError: it names none.
    """
    if name := _peft_settings(folder).get("base_model_name_or_path"):
        return str(name)
    raise AdapterFileError(f"{folder / PEFT_CONFIG} names no base; say which with --base FOLDER")


def _peft_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{folder / PEFT_CONFIG} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise AdapterFileError(f"{folder / PEFT_CONFIG} is damaged: it holds no JSON object")
    if not (folder / PEFT_TENSORS).exists():
        raise AdapterFileError(f"{folder} is not complete: {PEFT_TENSORS} is missing")
    return settings


def _within(values: Tensors, modules_to_save: Sequence[str]) -> dict[str, torch.Tensor]:
    """Those of the values that belong to modules which are saved as a whole."""
    return {name: value.cpu() for name, value in values.items() if is_within(name, modules_to_save)}


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
