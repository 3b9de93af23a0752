"""The stages at work: each stage that the graph names is called with the artifacts of those before it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.artifacts.store import Artifact, StageKey
from pipeline.config.recipe import Recipe
from pipeline.data.sources import DataSources
from pipeline.models.base import BaseModel
from pipeline.run.context import RunContext
from pipeline.run.dependencies import KeyInputs, Stage
from pipeline.run.graph import STAGE, side_by_side, stage_keys
from pipeline.run.warm_start import WarmStart


@dataclass(frozen=True)
class Work:
    """What every stage is handed: the run, and what all of it is made from.

    Attributes:
        inputs: what the keys are made from.
        start: the adapter to start from; None means from scratch.
        made: the artifacts of the stages that are over, by stage.
    """

    context: RunContext
    base: BaseModel
    sources: DataSources
    inputs: KeyInputs
    start: WarmStart | None = None
    made: dict[str, Artifact] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.context.recipe


def run_stages(work: Work) -> dict[str, Any]:
    """Find or make what each stage is there for, those side by side of which none needs another.

    The function NAME of `pipeline.run.stages.NAME` is called as `NAME(work, key, **inputs)`, with the results of other
    stages by the names of their artifacts. It is imported only here: it may load what its workers run.

    Returns:
        The results by stage: artifacts, or what stands around one (`artifact` is then a field of it).
    """
    keys = stage_keys(work.inputs)
    results: dict[str, Any] = {}
    for *others, last in side_by_side(work.inputs):
        # The last one in this thread: an interruption of the command reaches no other.
        with ThreadPoolExecutor(max(1, len(others)), "stage") as threads:
            running = {stage.name: threads.submit(_run, stage, work, keys, results) for stage in others}
            found = {last.name: _run(last, work, keys, results)}
        found |= {name: future.result() for name, future in running.items()}
        for stage in (*others, last):
            result = results[stage.name] = found[stage.name]
            work.made[stage.name] = result if isinstance(result, Artifact) else result.artifact
    return results


def _run(stage: Stage, work: Work, keys: Mapping[str, StageKey], results: Mapping[str, Any]) -> Any:
    depends = stage.depends(work.inputs)
    assert depends is not None
    inputs = {STAGE[name].artifact: results[name] for name in (*depends.stages, *depends.beside)}
    function = getattr(importlib.import_module(stage.module), stage.name)
    return function(work, keys[stage.name], **inputs)
