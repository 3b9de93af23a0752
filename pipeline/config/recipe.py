"""Recipes: the one place where a run is described, and the shipped ones by name.

A recipe is a YAML file of the sections in `pipeline.config.settings`: a file of the user, or a shipped one by its name
(`kasa run glue-roberta-base-sst2`). An unknown key is an error, which names the file, the dotted key, the value and the
nearest valid key.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from kasa.config import KasaConfig
from kasa.errors import nearest
from kasa.truncation import CALIBRATED
from pipeline.config.methods import AdapterSettings
from pipeline.config.reading import apply_override, explain, read_values
from pipeline.config.section import PlainName, Section
from pipeline.config.settings import (
    AboutSettings,
    BaseSettings,
    DataSettings,
    EvaluateSettings,
    PromotionSettings,
    RegisterSettings,
    SpectraSettings,
    TrainSettings,
)
from pipeline.core.errors import RecipeError
from pipeline.core.files import local_folder
from pipeline.core.redaction import redacted_values

# What text tells of a layer's inputs and outputs that the spectra depend on.
Weighted = Literal["no", "inputs", "both"]


@dataclass(frozen=True)
class NamedRecipe:
    """A shipped recipe.

    Attributes:
        name: The name that commands take in place of a file.
        file: Its YAML file.
        recipe: Its content, validated.
    """

    name: str
    file: Path
    recipe: Recipe

    @property
    def family(self) -> str:
        """The name of the folder that holds it."""
        return self.file.parent.name

    @property
    def fetched(self) -> list[str]:
        """The base model and data sources that a run would download, unless they are replaced by local files."""
        model = [] if self.recipe.base.model.startswith("embedded:") else [self.recipe.base.model]
        sources = [*self.recipe.data.train, *self.recipe.data.heldout]
        return model + [source for source in sources if source.startswith(("hub:", "http"))]

    @property
    def hardware(self) -> str:
        """The hardware that it asks for, such as `4 GPUs`."""
        workers = self.recipe.train.workers
        if not self.recipe.train.gpu:
            return f"{workers} CPU core{'s' if workers > 1 else ''}"
        return f"{workers} GPU{'s' if workers > 1 else ''}"

    @property
    def published(self) -> str:
        """The published result, such as `accuracy 95.2`; empty if there is none."""
        return ", ".join(f"{metric} {value:g}" for metric, value in self.recipe.about.published.items())


def catalogue() -> Iterator[NamedRecipe]:
    """All shipped recipes in the order of `named_recipes`."""
    for name, file in named_recipes().items():
        yield NamedRecipe(name, file, load_recipe(file))


class Recipe(Section):
    """Everything a run depends on."""

    name: PlainName = Field(description="Names the MLflow experiment and the registered model.")
    location: str = Field(
        "workspace",
        alias="workspace",
        description="Folder for artifacts, MLflow's database and reports, on storage that all nodes share; or a URL such "
        "as `s3://BUCKET/FOLDER`, beside an MLflow server (docs/storage.md).",
    )
    about: AboutSettings = Field(default_factory=AboutSettings)
    base: BaseSettings = Field(default_factory=BaseSettings)
    data: DataSettings
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    spectra: SpectraSettings = Field(default_factory=SpectraSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    promotion: PromotionSettings = Field(default_factory=PromotionSettings)
    register_: RegisterSettings = Field(default_factory=RegisterSettings, alias="register")

    model_config = ConfigDict(populate_by_name=True)

    @property
    def workspace(self) -> Path:
        """The folder of the workspace on this node."""
        return local_folder(self.location)

    @property
    def registered_name(self) -> str:
        """The name of the registered model."""
        return self.register_.model or self.name

    @property
    def dropped_rank(self) -> int:
        """How many singular triplets each adapted weight loses (0 with `truncation: none`, and with another method)."""
        if self.adapter.truncation == "none" or self.adapter.spec.components != "dropped":
            return 0
        return self.adapter.truncation_rank or self.adapter.rank

    @property
    def kasa_config(self) -> KasaConfig:
        """The `adapter` section in the terms of the method library."""
        adapter = self.adapter
        return KasaConfig(
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            truncation=adapter.truncation,
            dropped_rank=self.dropped_rank,
            regulariser=adapter.regulariser,
            singular_value_weight=adapter.singular_value_weight if adapter.singular_values else 0.0,
            orthogonality_weight=adapter.orthogonality_weight,
            singular_values=adapter.singular_values,
            singular_value_start=adapter.singular_value_start,
        )

    @property
    def decomposes(self) -> bool:
        """Whether the method begins with components of the base weights, which the spectra stage computes and keeps."""
        return bool(self.dropped_rank) or self.adapter.spec.components == "leading"

    @property
    def weighted(self) -> Weighted:
        """What text tells of a layer's inputs and outputs that the spectra depend on."""
        components = self.adapter.spec.components
        if components == "leading":
            return "inputs"
        if components == "none" or self.adapter.truncation not in CALIBRATED:
            return "no"
        return "both" if self.adapter.truncation == "loss" else "inputs"

    @property
    def calibrated(self) -> bool:
        """Whether the spectra depend on text."""
        return self.weighted != "no"

    @property
    def spectra_rank(self) -> int:
        """How many singular triplets are computed per weight."""
        if self.adapter.spec.components == "leading":
            return self.adapter.rank
        return self.spectra.rank or self.dropped_rank

    @model_validator(mode="before")
    @classmethod
    def _evaluation_follows_the_head(cls, values: Any) -> Any:
        """Fill in `evaluate.kind`, since a new head leaves only one."""
        blocks = values if isinstance(values, dict) else {}
        base, evaluate = blocks.get("base"), blocks.get("evaluate") or {}
        head = base.get("head") if isinstance(base, dict) else None
        if head not in ("classification", "regression") or not isinstance(evaluate, dict):
            return values
        return {**blocks, "evaluate": {"kind": head, **evaluate}}

    @model_validator(mode="after")
    def _head_agrees(self) -> Recipe:
        head, data, kind = self.base.head, self.data, self.evaluate.kind
        if head == "language-model":
            if kind in ("classification", "regression"):
                raise ValueError(f"evaluate.kind {kind} needs a head for it; set base.head: {kind}")
            if data.form == "labelled" or data.labels:
                key = "data.labels" if data.labels else "data.form: labelled"
                raise ValueError(f"{key} needs a head to learn the labels; set base.head: classification or regression")
            if self.train.head_learning_rate is not None:
                raise ValueError("train.head_learning_rate needs a new head; set base.head or remove it")
            return self
        if kind != head:
            raise ValueError(f"evaluate.kind {kind} does not fit base.head {head}; remove it")
        if data.form not in ("auto", "labelled"):
            raise ValueError(f"data.form {data.form} does not fit base.head {head}, which needs data of form labelled")
        if data.labels and head == "regression":
            raise ValueError("data.labels names classes, and base.head regression has none; remove it")
        without_meaning = {
            "data.prompt_template": data.prompt_template != "{prompt}",
            "data.chat_template": bool(data.chat_template),
            "data.system_prompt": data.system_prompt is not None,
            "data.train_on_prompt": data.train_on_prompt,
            "data.learn": data.learn != "all",
            "train.pack_tokens": self.train.pack_tokens is not None,
        }
        for key in (key for key, given in without_meaning.items() if given):
            raise ValueError(f"{key} has no meaning with base.head {head}, which reads each text by itself; remove it")
        return self

    @model_validator(mode="after")
    def _guards_are_measured(self) -> Recipe:
        measured = self.evaluate.measured
        for guard, fall in self.promotion.guards.items():
            if guard not in measured:
                hint = nearest(guard, measured) or f"; choose from {', '.join(measured)}"
                raise ValueError(f"promotion.guards.{guard}: no metric of that name is measured here{hint}")
            if guard == self.evaluate.gate_metric:
                raise ValueError(f"promotion.guards.{guard}: {guard} decides already; use promotion.margin")
            if fall < 0:
                raise ValueError(f"promotion.guards.{guard}: the largest fall {fall} must be 0 or more")
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        train = self.train
        if train.pack_tokens is not None and train.pack_tokens < self.data.max_tokens:
            raise ValueError(
                f"train.pack_tokens {train.pack_tokens} is less than data.max_tokens {self.data.max_tokens}: the "
                "longest sample would not fit"
            )
        if train.patience is not None and self.data.validation_rows is None:
            raise ValueError("train.patience needs validation samples; set data.validation_rows, such as 200")
        if train.start == "champion" and not self.adapter.spec.registrable:
            raise ValueError(
                f"train.start champion warm-starts from a KaSA adapter, and adapter.method is {self.adapter.method}; use "
                "train.start scratch"
            )
        if train.batch_size < train.workers:
            raise ValueError(f"train.batch_size {train.batch_size} leaves some of the {train.workers} workers idle")
        if train.fewest_workers > train.workers:
            raise ValueError(f"train.min_workers {train.min_workers} is more than train.workers {train.workers}")
        if self.spectra_rank < self.dropped_rank:
            raise ValueError(
                f"spectra.rank {self.spectra_rank} is smaller than the {self.dropped_rank} triplets the adapter drops"
            )
        return self


def named_recipes() -> dict[str, Path]:
    """The files of the shipped recipes by name: those at the top of `recipes/` first, then folder by folder."""
    package = find_spec("recipes")  # absent where a registered model is served: it does not carry the recipes
    if package is None or package.origin is None:
        return {}
    folder = Path(package.origin).parent
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (file.parent != folder, file))
    return {file.stem: file for file in files}


def find_recipe(path: Path) -> Path:
    """The recipe's file: `path` if it exists, else the shipped recipe of that name.

    Raises:
        RecipeError: There is neither.
    """
    if path.exists():
        return path
    named = named_recipes()
    if str(path) in named:
        return named[str(path)]
    raise RecipeError(
        f"recipe {path} does not exist; give a YAML file, or a name that `kasa recipes` lists{nearest(str(path), named)}"
    )


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, apply the overrides, and validate the result.

    Paths in `base.model`, `data.train`, `data.heldout` and `workspace` are relative to the working directory.

    Args:
        path: A file, or the name of a shipped recipe.
        overrides: Each of the form `section.key=value`, with a YAML value.

    Raises:
        RecipeError: The file is missing or no YAML mapping, an override is malformed, or a value is invalid.
    """
    path = find_recipe(path)
    values = read_values(path)
    changed = [apply_override(values, override) for override in overrides or []]
    return parse_recipe(values, str(path), changed)


def parse_recipe(values: dict[str, Any], where: str, overrides: Collection[tuple[str, ...]] = ()) -> Recipe:
    """Validate a recipe given as a mapping.

    Args:
        where: its origin, for errors.
        overrides: the paths of the keys that the command line has set, and that are its mistakes.

    Raises:
        RecipeError: Up to five problems, one line each, with the dotted key, the value and the nearest valid key.
    """
    try:
        # `promotion:` with nothing below is what is left when all its lines are commented out.
        return Recipe.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, where, overrides)) from None


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as YAML-ready values, in the form that is shown and stored with every run: without secrets."""
    return redacted_values(plain_values(recipe))


def plain_values(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as values to make another recipe from (`parse_recipe`), logins in its addresses included."""
    return recipe.model_dump(mode="json", by_alias=True)
