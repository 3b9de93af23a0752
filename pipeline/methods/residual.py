"""LoRAs that start from a part of each base weight: PiSSA, MiLoRA, OLoRA and CorDA.

W = (W0 - s B0 A0) + s B A: the part s B0 A0 is taken out of the base while the model trains, and B A begins as that part. So
a trained adapter is, on the untouched base, an ordinary LoRA of twice the rank: W = W0 + [s B | -s B0] [A ; A0].

- PiSSA (arXiv 2404.02948): the r largest singular triplets; B0 = U sqrt(S / s), A0 = sqrt(S / s) V^T.
- MiLoRA (arXiv 2406.09044): the r smallest, likewise.
- OLoRA (arXiv 2406.01775): the first r columns and rows of W0 = Q R; B0 = Q, A0 = R.
- CorDA (arXiv 2406.05223): the r components that count most for the calibration text, which the spectra stage computes
  (`pipeline.spectra.decomposition.leading_triplets`), split between B0 and A0 as in PiSSA.

PEFT has all but MiLoRA. It leaves B0 and A0 in the base's type, in which bf16 would round them after they are taken out; here
they are kept in fp32.

Legend: O = out features, I = in features, K = min(O, I), R = rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kasa.spectra import Triplets, bottom_triplets
from kasa.spectra_file import load_spectra
from kasa.targets import Target
from pipeline.methods.method import Adapted, Tensors
from pipeline.methods.peft import ADAPTER_NAME, PeftSettings, configuration, inject, save_as_lora
from pipeline.models.prompting import LANGUAGE_MODEL, Head

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe
    from pipeline.models.base import BaseModel

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ResidualMethod:
    """One of these methods, by its name.

    Attributes:
        spectra: folder of the components to start from; None where the method finds them itself.
    """

    name: str
    settings: PeftSettings
    spectra: Path | None = None

    def attach(
        self, model: nn.Module, seed: int, steps: int, modules_to_save: Sequence[str] = (), head: Head = LANGUAGE_MODEL
    ) -> Adapted:
        """See `Method.attach`."""
        config = configuration("LoraConfig", r=self.settings.rank, **self.settings.low_rank)
        _, parameters = inject(model, config, seed, modules_to_save)
        taken = self._take_out(model)

        def save(folder: Path, values: Tensors) -> None:
            save_as_lora(
                folder, self.settings, 2 * self.settings.rank, self._whole(values, taken), values, modules_to_save
            )

        return Adapted(parameters, save)

    def _take_out(self, model: nn.Module) -> dict[str, Factors]:
        """Move the initial part of each base weight into B and A; returns B0 and A0 by target, in fp32."""
        found = load_spectra(self.spectra)[0] if self.spectra else {}
        taken = {}
        for target in self.settings.targets:
            layer: Any = model.get_submodule(target.name)
            weight = layer.get_base_layer().weight
            scale = layer.scaling[ADAPTER_NAME]
            weight_OI = weight.data.T if target.transposed else weight.data
            b_OR, a_RI = initial_factors(self.name, weight_OI, self.settings.rank, scale, found.get(target.name))
            part_OI = scale * b_OR @ a_RI
            part = part_OI.T if target.transposed else part_OI
            weight.data = (weight.data.float() - part).to(weight.dtype).contiguous()
            layer.lora_A[ADAPTER_NAME].weight.data = a_RI.clone(memory_format=torch.contiguous_format)
            layer.lora_B[ADAPTER_NAME].weight.data = b_OR.clone(memory_format=torch.contiguous_format)
            taken[target.name] = b_OR, a_RI
        return taken

    def _whole(self, values: Tensors, taken: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
        """[A ; A0] and [s B | -s B0] of each target, by PEFT's names."""
        scale, tensors = self.settings.alpha / self.settings.rank, {}
        for name, (b_OR, a_RI) in taken.items():
            trained_b, trained_a = (values[f"{name}.lora_{part}.{ADAPTER_NAME}.weight"] for part in "BA")
            tensors[f"{name}.lora_A.weight"] = torch.cat([trained_a, a_RI.cpu()])
            tensors[f"{name}.lora_B.weight"] = scale * torch.cat([trained_b, -b_OR.cpu()], dim=1)
        return tensors


def build(
    recipe: Recipe, base: BaseModel, targets: tuple[Target, ...], spectra: Path | None, start: Path | None
) -> ResidualMethod:
    """See `pipeline.methods.method`."""
    computed = spectra if recipe.adapter.spec.components == "leading" else None
    return ResidualMethod(recipe.adapter.method, PeftSettings.of(recipe, base, targets), computed)


def initial_factors(
    method: str, weight_OI: torch.Tensor, rank: int, scale: float, found: Triplets | None = None
) -> Factors:
    """B0 of shape (O, R) and A0 of shape (R, I), in fp32 on the weight's device.

    Args:
        scale: s, which the product of the factors is multiplied by.
        found: the components to start from; None where the method finds them in the weight.

    Raises:
        SpectrumError: the weight has NaN or Inf, or fewer singular values than `rank`.
    """
    if found is not None:
        left_OR, right_RI = found.left_OR.to(weight_OI.device), found.right_RI.to(weight_OI.device)
        return _split(left_OR, found.singular_values_R.to(weight_OI.device), right_RI, scale)
    return _STARTS[method](weight_OI.detach().float(), rank, scale)


def _largest(weight_OI: torch.Tensor, rank: int, scale: float) -> Factors:
    left_OK, values_K, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    return _split(left_OK[:, :rank], values_K[:rank], right_KI[:rank], scale)


def _smallest(weight_OI: torch.Tensor, rank: int, scale: float) -> Factors:
    found = bottom_triplets(weight_OI, rank)
    return _split(found.left_OR, found.singular_values_R, found.right_RI, scale)


def _split(left_OR: torch.Tensor, values_R: torch.Tensor, right_RI: torch.Tensor, scale: float) -> Factors:
    """U S V^T / s as two factors that share the singular values evenly."""
    root_R = (values_R / scale).sqrt()
    return left_OR * root_R, root_R[:, None] * right_RI


def _orthonormal(weight_OI: torch.Tensor, rank: int, scale: float) -> Factors:
    q_OK, r_KI = torch.linalg.qr(weight_OI)
    return q_OK[:, :rank].contiguous(), r_KI[:rank].contiguous()


# The methods that find their part in the weight itself.
_STARTS: Mapping[str, Callable[[torch.Tensor, int, float], Factors]] = {
    "pissa": _largest,
    "milora": _smallest,
    "olora": _orthonormal,
}
