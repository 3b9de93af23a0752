"""The sections of a recipe that say what it is of and where it leads: `about`, `base`, `data` and `register`.

The other sections have modules of their own: `methods` (`adapter`), `training` (`spectra` and `train`) and `evaluate` (with
`promotion`). The `description` of every field is its documentation: `docs/recipe.md` is generated from it (`make docs`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from kasa.errors import nearest

HeadKind = Literal["language-model", "classification", "regression"]


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


StrList = Annotated[list[str], BeforeValidator(_as_list)]


class Section(BaseModel):
    """A block of the recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class AboutSettings(Section):
    """What people should know of a recipe; it changes nothing."""

    summary: str = Field("", description="The task and the model in a few words.")
    settings: Literal["published", "adapted", "ours"] = Field(
        "ours",
        description="Where the training settings come from. `published`: with the method's paper or code; `adapted`: from "
        "another published work on the same task; `ours`: chosen here.",
    )
    differences: str = Field("", description="What is not as published.")
    published: dict[str, float] = Field(default_factory=dict, description="The published result: metric -> value in %.")


class BaseSettings(Section):
    """Which pretrained model is adapted."""

    model: str = Field(
        "embedded:smollm2-135m-instruct",
        description="A local Hugging Face folder with safetensors weights, a hub id, or `embedded:NAME`.",
    )
    revision: str | None = Field(None, description="Hub revision; leave out for local folders.")
    head: HeadKind = Field(
        "language-model",
        description="`classification` and `regression` give the base, an encoder such as RoBERTa or a causal model, a new head "
        "with as many classes as the data has; all of it is trained beside the adapter and saved with it.",
    )


class DataSettings(Section):
    """Where the text comes from and how it becomes tokens."""

    train: StrList = Field(
        description="Files, globs, folders, `hub:OWNER/NAME[/SUBSET][@REVISION][:SPLIT]`, `https://...` or `embedded:NAME`. jsonl, json, csv, parquet, txt."
    )
    heldout: StrList = Field(default_factory=list, description="The held-out source; empty: split off from `train`.")
    calibration: StrList = Field(
        default_factory=list,
        description="Text that `adapter.truncation` looks at, in the form of `train`; empty: `train` itself.",
    )
    form: Annotated[str, NamedAbove("pipeline.data.forms")] = Field(
        "auto",
        description="How rows are read; `auto` decides by the columns of the first row. `labelled`, a text or a pair of them "
        "with a label, is the form for a new `base.head`.",
    )
    labels: list[str] = Field(
        default_factory=list,
        description="The names of the classes, in the order of their numbers in the data; empty: as the data has them.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Renames: the form's field -> the data's column, e.g. `{prompt: question, completion: answer}`.",
    )
    group_references: bool = Field(
        False,
        description="Held-out samples of one prompt become one sample with all their references, as E2E is scored. The "
        "loss is that of one of them, chosen by hash. In training each reference stays a sample of its own.",
    )
    separator: str | None = Field(
        None, description="Text files only: splits each line into prompt and completion at its first occurrence."
    )
    prompt_template: str = Field(
        "{prompt}",
        description="Wraps each prompt; `{prompt}` marks its place. Without a chat template the answer follows at once, so end with a space or a line break.",
    )
    chat_template: bool | None = Field(
        None, description="Use the tokenizer's chat template; default: where the tokenizer has one."
    )
    system_prompt: str | None = Field(
        None, description="A system message put before every prompt (chat template only)."
    )
    train_on_prompt: bool = Field(
        False,
        description="Learn prompts as well as answers; held-out samples are judged by their answers all the same.",
    )
    max_tokens: int = Field(
        512, ge=8, description="Longest sample in tokens, prompt and completion; longer rows are rejected."
    )
    max_rejected_share: float = Field(
        0.01, ge=0, le=1, description="Share of rows that may be unusable before the run stops."
    )
    heldout_share: float = Field(
        0.1, gt=0, lt=1, description="Share of the distinct prompts held out, if no source is named."
    )
    train_rows: int | None = Field(None, ge=1, description="Use at most this many training samples (after the split).")
    heldout_rows: int | None = Field(None, ge=1, description="Use at most this many held-out samples.")
    validation_rows: int | None = Field(
        None,
        ge=1,
        description="Set at least this many training samples aside, whole prompts, to watch training by; they are never "
        "trained on, and the final evaluation does not see them.",
    )
    split_seed: int = Field(0, description="Decides which prompts are held out, and which rows a limit keeps.")

    @model_validator(mode="after")
    def _template_has_its_place(self) -> DataSettings:
        if self.prompt_template.count("{prompt}") != 1:
            raise ValueError("prompt_template must contain {prompt} exactly once")
        if len(self.labels) == 1 or len(set(self.labels)) != len(self.labels):
            raise ValueError("labels need at least two different names")
        return self


class RegisterSettings(Section):
    """The MLflow model registry."""

    model: str | None = Field(None, description="Registered model name; default: the recipe's name.")
