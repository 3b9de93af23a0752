"""The terms of the stage graph: what a run's keys are made from, what a stage depends on, and what a stage is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config.recipe import Recipe
from pipeline.storage.artifacts import StageKey

if TYPE_CHECKING:
    from kasa.targets import Target

# The last stage of a whole run.
REGISTER = "register"


@dataclass(frozen=True)
class KeyInputs:
    """All that the keys of a run's stages are made from.

    Attributes:
        base, sources: digests of the base model and of the data.
        targets: the modules that carry an adapter.
        registry: where models are registered; empty for the workspace's own database.
        until: the last stage that is wanted. A whole run ends with `register`; a trial of a comparison with `evaluate`,
            or, to choose a learning rate, with `train`.
        trains: whether there is an adapter; without one the plain base is evaluated.
        champion: key of the training whose adapter this one starts from; None where it starts from scratch.
        taken_over: keys of artifacts that are used as they are, in the place of those that would be made.
        base_drops: whether the base itself drops activations at random in training, as encoders do.
    """

    recipe: Recipe
    base: str = ""
    sources: str = ""
    targets: Sequence[Target] = ()
    registry: str = ""
    until: str = REGISTER
    trains: bool = True
    champion: str | None = None
    taken_over: Mapping[str, StageKey] = field(default_factory=dict)
    base_drops: bool = False

    @property
    def registers(self) -> bool:
        """Whether this is a whole run."""
        return self.until == REGISTER

    @property
    def target_names(self) -> list[str]:
        """The names of the targets, in the model's order."""
        return [target.name for target in self.targets]


@dataclass(frozen=True)
class Dependencies:
    """What a stage depends on for given inputs.

    Attributes:
        settings: those that count, by section.
        code: the modules that compute: they run on the workers, or the driver calls them for the result. They count with
            everything they import (`pipeline.core.code`).
        driver: modules of the driver that decide what is computed, beside the stage's own. They count by themselves:
            what they import is Ray, MLflow and storage, and what of it computes stands in `code`.
        packages: distributions whose versions count.
        stages: the stages whose artifacts are inputs.
        digests: the inputs from outside, and what stands for them.
        beside: stages whose artifacts are handed over too, though the key is made without them.
    """

    settings: Mapping[str, Any]
    code: Sequence[str]
    packages: Sequence[str]
    driver: Sequence[str] = ()
    stages: Sequence[str] = ()
    digests: Mapping[str, Any] = field(default_factory=dict)
    beside: Sequence[str] = ()


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: of the stage, and of its function in `pipeline.run.stages.NAME`.
        artifact: under which name what it makes is an input of others.
        depends: what it depends on; None where such a run has no need of it.
        reserves: CPU cores and GPUs that it must have at once, at the least.
        after: stages that have to be over, though nothing of theirs is used.
    """

    name: str
    artifact: str
    depends: Callable[[KeyInputs], Dependencies | None]
    reserves: Callable[[Recipe], tuple[float, int]]
    after: Sequence[str] = ()

    @property
    def module(self) -> str:
        """The driver's module."""
        return f"pipeline.run.stages.{self.name}"
