"""AdaLoRA (arXiv 2303.10512): B diag(d) A, of which the least important singular triplets are set to zero between steps.

PEFT's allocator decides which. What it remembers of earlier steps is state that checkpoints keep, so that a resumed run
decides as an uninterrupted one.

Legend: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kasa.targets import Target
from pipeline.methods.method import Adapted, Tensors
from pipeline.methods.peft import ADAPTER_NAME, PeftSettings, configuration, inject, saver
from pipeline.models.prompting import LANGUAGE_MODEL, Head

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe
    from pipeline.models.base import BaseModel

# The phases, as shares of the steps: all triplets until the first, then fewer and fewer, as many as are left from the last.
_WARMUP, _END = 0.1, 0.3

# The attributes of PEFT's allocator that it carries from step to step.
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_PATTERN = "rank_pattern"


@dataclass(frozen=True)
class AdaLoraMethod:
    """AdaLoRA as PEFT has it, with its penalty and its allocator driven by the training loop.

    Attributes:
        first_rank: the rank of every module to begin with; `settings.rank` is what is left on average.
    """

    settings: PeftSettings
    first_rank: int

    def attach(
        self, model: nn.Module, seed: int, steps: int, modules_to_save: Sequence[str] = (), head: Head = LANGUAGE_MODEL
    ) -> Adapted:
        """See `Method.attach`."""
        config = configuration(
            "AdaLoraConfig",
            init_r=self.first_rank,
            target_r=self.settings.rank,
            tinit=int(_WARMUP * steps),
            tfinal=int(_END * steps),
            total_step=steps,
            deltaT=max(1, steps // 100),
            **self.settings.low_rank,
        )
        wrapped, parameters = inject(model, config, seed, modules_to_save)
        layers: list[Any] = [model.get_submodule(target.name) for target in self.settings.targets]
        pairs = [(layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]) for layer in layers]
        weight = config.orth_reg_weight
        return Adapted(
            parameters,
            saver(wrapped, self.settings.base_name, modules_to_save),
            # PEFT adds this in the forward pass of its own model, which is not the one that is called here.
            penalties=lambda: {"orthogonality_penalty": weight * _orthogonality(pairs)},
            allocation=RankAllocation(wrapped.base_model, parameters),
        )


def build(
    recipe: Recipe, base: BaseModel, targets: tuple[Target, ...], spectra: Path | None, start: Path | None
) -> AdaLoraMethod:
    """See `pipeline.methods.method`."""
    return AdaLoraMethod(PeftSettings.of(recipe, base, targets), recipe.adapter.adalora_first_rank)


class RankAllocation:
    """PEFT's allocator as an `Allocation`.

    Args:
        tuner: PEFT's AdaLoraModel.
        parameters: the trained ones, by their names in the model.
    """

    def __init__(self, tuner: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self._tuner = tuner
        self._config = tuner.peft_config[ADAPTER_NAME]
        self._parameters = parameters
        self._gradients: dict[str, torch.Tensor] = {}

    def before_step(self) -> None:
        """Keep the gradients: importance is value times gradient, and the engine clears the gradients in its step."""
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


def _orthogonality(pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> torch.Tensor:
    """The mean of ||A A^T - I||_F and ||B^T B - I||_F over all modules."""
    norms = []
    for a_RI, b_OR in pairs:
        for gram_RR in (a_RI @ a_RI.T, b_OR.T @ b_OR):
            identity = torch.eye(len(gram_RR), dtype=gram_RR.dtype, device=gram_RR.device)
            norms.append(torch.linalg.matrix_norm(gram_RR - identity))
    return torch.stack(norms).mean()
