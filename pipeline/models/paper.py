"""A base model on paper: names, classes and sizes of its parts, which is all that a plan asks of it.

A plain decoder is drawn from its configuration. To draw another takes torch and transformers, whose import alone is five
seconds of a core, so it is remembered on this machine, by the configuration that it follows from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kasa.targets import Outline, Target, as_target
from pipeline.config.settings import BaseSettings, HeadKind
from pipeline.core.code import code_digests, package_versions
from pipeline.core.files import atomic_write, content_digest, machine_cache
from pipeline.models.plain_decoders import PlainDecoder, fitting_decoder, plain_decoder
from pipeline.models.shapes import base_outline, known_values, meta_model, model_config, position_count

if TYPE_CHECKING:
    from torch import nn

# What a plan reads of a configuration, by the names that transformers' models have for it.
_CONFIG = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "head_dim", "num_key_value_heads",
    "intermediate_size", "n_inner",
)  # fmt: skip


@dataclass(frozen=True)
class PaperParameter:
    """A parameter that has a size and nothing else."""

    size: int

    def numel(self) -> int:
        """The number of its elements."""
        return self.size


class PaperModule:
    """A module without weights, with the part of torch's interface that a plan uses."""

    def __init__(self, name: str, root: PaperModel, values: Mapping[str, Any]) -> None:
        self.name, self._root = name, root
        self.sizes: list[int] = values["sizes"]
        self.target = Target(**values["target"]) if values["target"] else None

    def named_modules(self) -> Iterator[tuple[str, PaperModule]]:
        """All modules within this one, itself included, by their full names."""
        inside = f"{self.name}." if self.name else ""
        for name, module in self._root.parts.items():
            if name == self.name or name.startswith(inside):
                yield name, module

    def parameters(self) -> Iterator[PaperParameter]:
        """The parameters of all modules within, each once."""
        for _, module in self.named_modules():
            yield from map(PaperParameter, module.sizes)

    def children(self) -> Iterator[PaperModule]:
        """The modules right below."""
        depth = self.name.count(".") + 1 if self.name else 0
        for name, module in self.named_modules():
            if name != self.name and name.count(".") == depth:
                yield module

    def named_children(self) -> Iterator[tuple[str, PaperModule]]:
        """The modules right below, by their own names."""
        for module in self.children():
            yield module.name.rpartition(".")[2], module


class PaperModel(PaperModule):
    """A whole model.

    Args:
        drawing: what `draw` made of it.
    """

    def __init__(self, drawing: Mapping[str, Any]) -> None:
        self._drawing = drawing
        self.config = SimpleNamespace(**drawing["config"])
        self.base_model_prefix = str(drawing["prefix"])
        self.positions: int | None = drawing["positions"]
        super().__init__("", self, drawing["parts"][""])

    @cached_property
    def parts(self) -> dict[str, PaperModule]:
        """All modules by their full names, in the model's own order."""
        # Where a name of no target is asked for, the error says of what class it is.
        return {
            name: self if not name else type(values["kind"], (PaperModule,), {})(name, self, values)
            for name, values in self._drawing["parts"].items()
        }

    def get_submodule(self, name: str) -> PaperModule:
        """The module of this full name."""
        return self.parts[name]

    def get_output_embeddings(self) -> PaperModule | None:
        """The output head of a language model."""
        head = self._drawing["output"]
        return self.parts[head] if head else None


def planned_model(settings: BaseSettings, folder: Path | None) -> PaperModel | None:
    """The model of a recipe's base; None if its shape is not known on this machine.

    Args:
        folder: where the base lies, if it is here.

    Raises:
        BaseModelError: its configuration cannot be used, or transformers has no such model.
    """
    values = known_values(settings.model, folder)
    if settings.head == "language-model" and (decoder := plain_decoder(values or {})) is not None:
        return _on_paper(decoder)
    file = _file(settings, values) if values else None
    with suppress(OSError, ValueError, KeyError, TypeError):
        if file is not None:
            return PaperModel(json.loads(file.read_text(encoding="utf-8")))
    config = model_config(settings.model, settings.revision, folder)
    if config is None:
        return None
    drawing = draw(meta_model(config, settings.head))
    with suppress(OSError):  # a home that cannot be written is no obstacle
        if file is not None:
            atomic_write(file, json.dumps(drawing))
    return PaperModel(drawing)


def plain_outline(folder: Path, head: HeadKind) -> Outline | None:
    """The outline of a language model that is a plain decoder and whose checkpoint is whole; else None.

    Raises:
        SpectrumError: a file of the checkpoint is missing or damaged.
    """
    decoder = fitting_decoder(folder) if head == "language-model" else None
    if decoder is None:
        return None
    model: Any = _on_paper(decoder)
    return replace(base_outline(model, head), drops=decoder.drops, positions=decoder.positions)


def _on_paper(decoder: PlainDecoder) -> PaperModel:
    return PaperModel(decoder.drawing(_CONFIG))


def draw(model: nn.Module) -> dict[str, Any]:
    """What a plan asks of a model, as JSON values."""
    sizes: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():  # tied ones once
        sizes.setdefault(name.rpartition(".")[0], []).append(parameter.numel())
    heads: Any = getattr(model, "get_output_embeddings", lambda: None)()
    parts: dict[str, Any] = {}
    output = ""
    for name, module in model.named_modules():
        target = as_target(name, module)
        parts[name] = {
            "kind": type(module).__name__,
            "sizes": sizes.get(name, []),
            "target": asdict(target) if target else None,
        }
        output = name if module is heads else output
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {
        "parts": parts,
        "output": output,
        "prefix": str(model.base_model_prefix),
        "config": {name: value for name in _CONFIG if (value := getattr(text, name, None)) is not None},
        "positions": position_count(model),
    }


def _file(settings: BaseSettings, values: Mapping[str, Any]) -> Path:
    """Where the drawing of the base of this configuration is kept."""
    asked = {
        "config": values,
        "head": settings.head,
        **code_digests([__name__]),
        **package_versions(["transformers", "torch"]),
    }
    return machine_cache() / "shapes" / f"{content_digest(asked)[:32]}.json"
