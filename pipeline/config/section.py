"""A section of a recipe and the kinds of values in it, with the rules that hold for every key."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    field_validator,
)
from pydantic_core import CoreSchema, core_schema

from kasa.errors import nearest
from pipeline.core.files import user_path

# No count, rate or duration of a training comes near it, and everything up to it is exact in JSON.
_LARGEST_NUMBER = 10**15
# Training explodes far below; the limit is for what would overflow before it could be said.
LARGEST_RATE = 10**6
LARGEST_SEED = 2**32 - 1  # numpy's
WEEK_S = 7 * 24 * 3600


@dataclass(frozen=True)
class OneOf:
    """Marks a text that must be a name of a catalogue, as in `Annotated[str, OneOf("method", METHODS)]`.

    Attributes:
        what: what such a name stands for, in errors.
        names: the names there are, in the order of the documentation.
    """

    what: str
    names: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: str) -> str:
        if value not in self.names:
            hint = nearest(value, self.names) or f"; choose one of {', '.join(self.names)}"
            raise ValueError(f"there is no such {self.what}{hint}")
        return value


@dataclass(frozen=True)
class NamedAbove:
    """Marks a text that must be a name of a table on a higher floor, which this floor cannot read.

    Attributes:
        table: the module that has the table and checks the name.
    """

    table: str


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _plain_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
        raise ValueError("a name consists of letters, digits, `_`, `.` and `-`, and begins with a letter or digit")
    return value


def _check_usable(value: Any, remarks: bool) -> None:
    """Refuse numbers that overflow what computes with them, and texts that no file, path or service takes."""
    if isinstance(value, (int, float)):
        if abs(value) > _LARGEST_NUMBER:
            raise ValueError(f"the number must be at most {_LARGEST_NUMBER:g} in size")
    elif isinstance(value, str):
        if not value and not remarks:
            raise ValueError("the text is empty; leave the key out instead")
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(
                "the text holds a character that cannot be written to a file (NUL or half a surrogate pair)"
            )
    elif isinstance(value, (list, dict)):
        for part in value:
            _check_usable(part, remarks)
        for part in value.values() if isinstance(value, dict) else ():
            _check_usable(part, remarks)


StrList = Annotated[list[str], BeforeValidator(_as_list)]


def _cpu_share(value: float) -> float:
    if round(value, 4) != value:
        raise ValueError("Ray counts cores in steps of 0.0001")
    return value


# A path on this machine, with `~` for the home folder.
PathText = Annotated[str, AfterValidator(lambda value: str(user_path(value)))]

CpuShare = Annotated[float, Field(ge=0.0001, le=10_000), AfterValidator(_cpu_share)]

# A name that MLflow takes for an experiment or a registered model, that its queries and URIs need not escape, and that
# file names can hold.
PlainName = Annotated[str, Field(max_length=100), AfterValidator(_plain_name)]


class Section(BaseModel):
    """A block of the recipe: immutable, an unknown key is an error, and so is a value that nothing can compute with."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    # Whether an empty text means something.
    _remarks: ClassVar[bool] = False

    @field_validator("*")
    @classmethod
    def _usable(cls, value: Any) -> Any:
        _check_usable(value, cls._remarks)
        return value
