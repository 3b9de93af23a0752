"""The head on top of the base: its own language model head, or a new head that predicts a class or a number.

A new head is trained in full beside the adapter and stored with it. `head.json` beside both says what its outputs mean.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.settings import HeadKind
from pipeline.core.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

FILE_NAME = "head.json"
# Separates the two texts of a pair where only one text can be given, as in `kasa generate`.
PAIR_SEPARATOR = " ||| "


@dataclass(frozen=True)
class Head:
    """The head of a model.

    Attributes:
        kind: `language-model` is the base's own head; the others are new.
        classes: The names of the classes in the order of the outputs; empty unless `kind` is `classification`.
        pairs: Whether it was trained on pairs of texts.
    """

    kind: HeadKind = "language-model"
    classes: tuple[str, ...] = ()
    pairs: bool = False

    @property
    def is_new(self) -> bool:
        """Whether it is a new head, which is trained in full beside the adapter."""
        return self.kind != "language-model"

    @property
    def outputs(self) -> int:
        """How many numbers a new head gives for each text."""
        return len(self.classes) if self.kind == "classification" else 1

    def save(self, folder: Path) -> None:
        """Write `head.json` into a folder. Nothing is written for the base's own head."""
        if self.is_new:
            text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
            folder.joinpath(FILE_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Head:
        """Read `head.json` from a folder. Without such a file it is the base's own head.

        Raises:
            ModelError: The file is damaged.
        """
        path = folder / FILE_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(values["kind"], tuple(values["classes"]), values["pairs"])
        except FileNotFoundError:
            return LANGUAGE_MODEL
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{path} is damaged ({error}); copy it again from the run that made it") from None


LANGUAGE_MODEL = Head()


def head_modules(model: nn.Module) -> list[str]:
    """The names of the modules of a transformers model beside its body: those of the new head of a model for labels."""
    body = str(model.base_model_prefix)
    return [name for name, module in model.named_children() if name != body and any(True for _ in module.parameters())]
