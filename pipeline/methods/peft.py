"""AdaLoRA's budget (arXiv 2303.10512): between steps the least important singular triplets of all layers are set to zero.

PEFT's allocator does it. What it remembers of the steps before is state, which checkpoints keep so that a resumed run
decides as an undisturbed one.

The methods of Hugging Face PEFT, and MiLoRA in the form of its LoRA. The one door to PEFT.

PEFT puts its layers into the base in place; the base itself is what is trained and called, so that labels, packing and
generation are the same for every method. What is saved is PEFT's own folder: `PeftModel.from_pretrained(base, folder)`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as _LAST_OF_BLOCK
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from kasa.errors import AdapterFileError
from kasa.interchange import PEFT_CONFIG, PEFT_PREFIX, PEFT_TENSORS, new_folder, write_peft_folder
from kasa.spectra_file import load_spectra
from kasa.targets import Target, is_within
from pipeline.core.errors import TrainingError
from pipeline.methods.method import Adapted, Tensors, adalora_rank, norm_names
from pipeline.methods.residual import RESIDUAL_METHODS, Factors, initial_factors
from pipeline.models.heads import LANGUAGE_MODEL, Head

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_PATTERN = "rank_pattern"


class RankAllocation:
    """PEFT's allocator as an `Allocation`.

    Args:
        tuner: PEFT's AdaLoraModel.
        parameters: the trained ones, by their names in the model.
    """

    def __init__(self, tuner: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self._tuner = tuner
        self._config = tuner.peft_config["default"]
        self._parameters = parameters
        self._gradients: dict[str, torch.Tensor] = {}

    def before_step(self) -> None:
        """Keep the gradients, which the engine clears in its step; importance is value times gradient."""
        self._gradients = {
            name: parameter.grad.clone() for name, parameter in self._parameters.items() if parameter.grad is not None
        }

    def after_step(self, step: int) -> None:
        """Update the importances and, where it is time, set triplets to zero."""
        for name, gradient in self._gradients.items():
            self._parameters[name].grad = gradient
        self._tuner.update_and_allocate(step)
        for name in self._gradients:
            self._parameters[name].grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """See `Allocation.state`."""
        allocator = self._tuner.rankallocator
        found = {
            f"{average}/{name}": value.cpu()
            for average in _AVERAGES
            for name, value in getattr(allocator, average).items()
        }
        pattern = self._config.rank_pattern or {}
        return found | {f"{_PATTERN}/{name}": torch.tensor(kept) for name, kept in pattern.items()}

    def restore(self, state: Tensors) -> None:
        """See `Allocation.restore`."""
        split = {key: key.split("/", 1) for key in state}
        for average in _AVERAGES:
            values = {
                name: state[key].to(self._parameters[name].device)
                for key, (kind, name) in split.items()
                if kind == average
            }
            setattr(self._tuner.rankallocator, average, values)
        pattern = {name: state[key].tolist() for key, (kind, name) in split.items() if kind == _PATTERN}
        self._config.rank_pattern = pattern or None


_NAME = "default"
# AdaLoRA's phases, as shares of the steps: all triplets, then fewer and fewer, then as many as are left.
_ADALORA_WARMUP, _ADALORA_END = 0.1, 0.3


@dataclass(frozen=True)
class PeftMethod:
    """One of PEFT's methods, or MiLoRA.

    Attributes:
        name: as in `adapter.method`.
        rank, alpha, dropout: as in the recipe's `adapter`; what a method does not know is not used.
        base_name: the base, for the adapter's record.
        spectra: folder of the components that CorDA begins with.
    """

    name: str
    targets: tuple[Target, ...]
    rank: int
    alpha: float
    dropout: float
    base_name: str
    spectra: Path | None = None

    def attach(
        self, model: nn.Module, seed: int, steps: int, whole: Sequence[str] = (), head: Head = LANGUAGE_MODEL
    ) -> Adapted:
        """See `Method.attach`."""
        config = self._config(model, seed, steps)
        wrapped = _inject(model, config, seed)
        for name in whole:
            model.get_submodule(name).requires_grad_(True)
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if self.name == "vera":
            # Buffers, which the engine leaves in fp32 though everything around them be bf16.
            for shared in (wrapped.base_model.vera_A, wrapped.base_model.vera_B):
                shared[_NAME] = shared[_NAME].to(next(model.parameters()).dtype)
        if self.name in RESIDUAL_METHODS:
            taken = self._take_out(model)
            return Adapted(parameters, lambda folder, values: self._save_residual(folder, values, taken, whole))

        def save(folder: Path, values: Tensors) -> None:
            _save(folder, wrapped, values, self.base_name, whole)

        if self.name != "adalora":
            return Adapted(parameters, save)
        pairs = _adalora_pairs(model, self.targets)
        weight = config.orth_reg_weight
        return Adapted(
            parameters,
            save,
            penalties=lambda: {"orthogonality_penalty": weight * _orthogonality(pairs)},
            allocation=RankAllocation(wrapped.base_model, parameters),
        )

    def _config(self, model: nn.Module, seed: int, steps: int) -> Any:

        names = [target.name for target in self.targets]
        transposed = any(target.transposed for target in self.targets)
        if self.name == "vera":
            return peft.VeraConfig(
                r=self.rank, vera_dropout=self.dropout, target_modules=names, projection_prng_key=seed,
                fan_in_fan_out=transposed,
            )  # fmt: skip
        if self.name == "fourierft":
            return peft.FourierFTConfig(
                n_frequency=self.rank, target_modules=names, random_loc_seed=seed, fan_in_fan_out=transposed
            )
        if self.name == "ia3":
            return peft.IA3Config(
                target_modules=names, feedforward_modules=feedforward_names(model, self.targets),
                fan_in_fan_out=transposed,
            )  # fmt: skip
        if self.name == "layernorm":
            return peft.LNTuningConfig(target_modules=norm_names(model))
        low_rank: dict[str, Any] = {
            "target_modules": names, "lora_alpha": self.alpha, "lora_dropout": self.dropout,
            "fan_in_fan_out": transposed,
        }  # fmt: skip
        if self.name == "adalora":
            first, last = int(_ADALORA_WARMUP * steps), int(_ADALORA_END * steps)
            return peft.AdaLoraConfig(
                init_r=adalora_rank(self.rank), target_r=self.rank, tinit=first, tfinal=last, total_step=steps,
                deltaT=max(1, steps // 100), **low_rank,
            )  # fmt: skip
        return peft.LoraConfig(r=self.rank, use_rslora=self.name == "rslora", use_dora=self.name == "dora", **low_rank)

    def _take_out(self, model: nn.Module) -> dict[str, Factors]:
        """Move each target's initial part from the base weight into its B and A; the parts, in fp32."""
        spectra = load_spectra(self.spectra)[0] if self.name == "corda" and self.spectra else {}
        taken = {}
        for target in self.targets:
            layer: Any = model.get_submodule(target.name)
            weight = layer.get_base_layer().weight
            scale = layer.scaling[_NAME]
            weight_OI = weight.data.T if target.transposed else weight.data
            b_OR, a_RI = initial_factors(self.name, weight_OI, self.rank, scale, spectra.get(target.name))
            part_OI = scale * b_OR @ a_RI
            part = part_OI.T if target.transposed else part_OI
            weight.data = (weight.data.float() - part).to(weight.dtype).contiguous()
            layer.lora_A[_NAME].weight.data = a_RI.clone(memory_format=torch.contiguous_format)
            layer.lora_B[_NAME].weight.data = b_OR.clone(memory_format=torch.contiguous_format)
            taken[target.name] = b_OR, a_RI
        return taken

    def _save_residual(self, folder: Path, values: Tensors, taken: Mapping[str, Factors], whole: Sequence[str]) -> None:
        """As an ordinary LoRA on the untouched base, whose scale is 1."""
        scale, tensors = self.alpha / self.rank, _within(values, whole)
        for name, (b_OR, a_RI) in taken.items():
            trained_b, trained_a = (values[f"{name}.lora_{part}.{_NAME}.weight"] for part in "BA")
            tensors[f"{name}.lora_A.weight"] = torch.cat([trained_a, a_RI.cpu()])
            tensors[f"{name}.lora_B.weight"] = scale * torch.cat([trained_b, -b_OR.cpu()], dim=1)
        config = {
            "base_model_name_or_path": self.base_name,
            "fan_in_fan_out": any(target.transposed for target in self.targets),
            "lora_alpha": 2 * self.rank,
            "lora_dropout": 0.0,
            "r": 2 * self.rank,
            "target_modules": list(taken),
            **({"modules_to_save": list(whole), "task_type": None} if whole else {}),
        }
        shutil.rmtree(folder, ignore_errors=True)
        write_peft_folder(folder, config, tensors, None)


def feedforward_names(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """The targets that IA3 scales the inputs of, not the outputs: the last of a feed-forward block, as PEFT knows it."""
    config: Any = model.config
    last = _LAST_OF_BLOCK.get(config.model_type, [])
    return [target.name for target in targets if any(target.name.endswith(f".{name}") for name in last)]


def load_peft_folder(model: nn.Module, folder: Path) -> None:
    """Put an adapter that PEFT or this module saved into a loaded base, in place.

    Raises:
        AdapterFileError: the folder is damaged, or made for another architecture.
    """
    _peft_settings(folder)
    try:
        with _quiet(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            peft.PeftModel.from_pretrained(model, str(folder))
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise AdapterFileError(f"{folder} cannot be put onto this base: {_first_line(error)}") from None
    for one in said:
        if "missing adapter keys" in str(one.message):
            raise AdapterFileError(f"{folder} is not complete: {_first_line(one.message)}")


def base_of_peft_folder(folder: Path) -> str:
    """The base that PEFT's configuration names.

    Raises:
        AdapterFileError: there is none.
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


def _inject(model: nn.Module, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise TrainingError(f"PEFT cannot adapt this base so: {_first_line(error)}") from error


def _within(values: Tensors, whole: Sequence[str]) -> dict[str, torch.Tensor]:
    """What of the values belongs to modules that were trained whole."""
    return {name: value.cpu() for name, value in values.items() if is_within(name, whole)}


def _save(folder: Path, wrapped: Any, values: Tensors, base: str, whole: Sequence[str]) -> None:
    """PEFT's folder of the method in force, with `values` in place of what the model holds, which may be rounded."""
    state = {name: values.get(name.removeprefix(PEFT_PREFIX), tensor) for name, tensor in wrapped.state_dict().items()}
    with _quiet():
        tensors = peft.get_peft_model_state_dict(wrapped, state_dict=state, save_embedding_layers=False)
    config = wrapped.peft_config[_NAME]
    tensors |= {f"{PEFT_PREFIX}{name}": value for name, value in _within(values, whole).items()}
    config.inference_mode, config.base_model_name_or_path = True, base
    config.modules_to_save = list(whole) or None
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as new:
        stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(stored, new / PEFT_TENSORS, metadata={"format": "pt"})
        config.save_pretrained(str(new))


def _adalora_pairs(model: nn.Module, targets: Sequence[Target]) -> list[tuple[nn.Parameter, nn.Parameter]]:
    layers: list[Any] = [model.get_submodule(target.name) for target in targets]
    return [(layer.lora_A[_NAME], layer.lora_B[_NAME]) for layer in layers]


def _orthogonality(pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> torch.Tensor:
    """Mean over all A and B of ||A A^T - I||_F and ||B^T B - I||_F, which PEFT adds in a forward pass that is not ours."""
    norms = []
    for a_RI, b_OR in pairs:
        for gram_RR in (a_RI @ a_RI.T, b_OR.T @ b_OR):
            identity = torch.eye(len(gram_RR), dtype=gram_RR.dtype, device=gram_RR.device)
            norms.append(torch.linalg.matrix_norm(gram_RR - identity))
    return torch.stack(norms).mean()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
