"""What stands on top of the base: its own language model, or a new head that answers with a class or a number.

A new head is as good as its training, so it is kept with the adapter, and `head.json` beside both says what its outputs mean.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.config.settings import HeadKind
from pipeline.core.errors import ModelError

FILE_NAME = "head.json"
# How the two texts of a pair are written where there is one text to be given, as in `kasa generate`.
PAIR_SEPARATOR = " ||| "


@dataclass(frozen=True)
class Head:
    """The head of a model.

    Attributes:
        kind: `language-model` is the base's own; the others are new.
        classes: their names, in the order of the outputs; empty but for `classification`.
        pairs: whether it was made for pairs of texts.
    """

    kind: HeadKind = "language-model"
    classes: tuple[str, ...] = ()
    pairs: bool = False

    @property
    def is_new(self) -> bool:
        """Whether it is trained whole, beside the adapter."""
        return self.kind != "language-model"

    @property
    def outputs(self) -> int:
        """How many numbers a new head gives for a text."""
        return len(self.classes) if self.kind == "classification" else 1

    def save(self, folder: Path) -> None:
        """Write `head.json` into a folder; nothing for the base's own head."""
        if self.is_new:
            text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
            folder.joinpath(FILE_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Head:
        """Read `head.json` from a folder; the base's own head where there is none.

        Raises:
            ModelError: the file is damaged.
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
