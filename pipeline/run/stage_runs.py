"""The stages at work, each in an MLflow run of its own.

Each stage that the graph names is called with the artifacts of those before it. Its run is opened or resumed around the
stage's work, with what is worth seeing of its artifacts.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kasa.errors import DamagedFileError, KasaError
from kasa.files import read_json
from pipeline.config.recipe import Recipe
from pipeline.core.files import atomic_write
from pipeline.data.sources import DataSources
from pipeline.models.base import BaseModel
from pipeline.report.facts import StageFacts
from pipeline.run.context import RunContext
from pipeline.run.dependencies import KeyInputs, Stage
from pipeline.run.graph import STAGE, side_by_side, stage_keys
from pipeline.run.lineage import ingredients_by_name, of_recipe, stored_artifacts, why_made
from pipeline.run.warm_start import WarmStart
from pipeline.storage.artifacts import Artifact, StageKey
from pipeline.storage.mirror import MANIFEST, discard_work

# Artifacts up to this size are copied into MLflow, larger ones referred to by path and key.
COPIED_BYTES = 64 * 2**20
# Which files unfinished work was begun with. Hidden, so neither a part of the artifact nor mirrored to other machines.
_INPUTS = ".inputs.json"
# What each split is for, in MLflow's words.
SPLITS = {"train": "training", "heldout": "evaluation"}

# Fills an artifact's folder and returns the facts about it.
Make = Callable[[Path], dict[str, Any]]
# Logs to the run of the given id what is worth seeing of an artifact.
Publish = Callable[[str, Artifact], None]


@dataclass
class StageRun:
    """One stage at work in its MLflow run.

    Attributes:
        resumed: the run was begun by an earlier process that did not live to end it.
        status, key: `computed` or `reused`, and the key of the stage's main artifact.
    """

    context: RunContext
    run_id: str
    resumed: bool
    status: str = "computed"
    key: str = ""

    def artifact(self, key: StageKey, make: Make) -> Artifact:
        """Find or make an artifact that remembers the run it was made in."""
        recomputed = self.context.recomputed.get(key.stage)
        recompute = recomputed is not None and key.key not in recomputed

        def make_and_remember(folder: Path) -> dict[str, Any]:
            started = time.perf_counter()
            self._begin(key.stage, folder)
            facts = make(folder)
            try:
                self.context.check_inputs()
            except KasaError:
                # Nothing of it, no checkpoint either, may be taken for what the key stands for.
                discard_work(folder)
                raise
            (folder / _INPUTS).unlink()
            own = {"recipe": self.context.recipe.name, "mlflow_run_id": self.run_id}
            return {**facts, **own, "seconds": time.perf_counter() - started}

        artifact = self.context.store.find_or_make(key, make_and_remember, recompute)
        if recomputed is not None and recompute:
            recomputed.append(key.key)
            self.context.save()
        return artifact

    def _begin(self, stage: str, folder: Path) -> None:
        """Note which files are read, and discard the unfinished work of a process that may have read others in their place.

        Such a process may have been killed before it could notice, and the right files be back. Work of another machine,
        or from files at another place, cannot be told so and goes on.
        """
        note, now = folder / _INPUTS, self.context.inputs
        try:
            before = read_json(note) if note.exists() else now
        except DamagedFileError:
            before = {**now, "states": None}
        if before != now and before.get("place") == now["place"]:
            self.context.bars.say(
                f"{stage}: begins anew, for files of {now['place'].partition(':')[2]} were written, replaced or moved since its "
                "unfinished work was begun"
            )
            discard_work(folder)
        atomic_write(note, json.dumps(now))

    def main_artifact(self, key: StageKey, make: Make) -> Artifact:
        """The artifact that the stage is there for: its key and whether it was reused are tags of the run."""
        tracking = self.context.tracking
        tracking.tag(self.run_id, {"kasa.key": key.key})
        # Of the parts of a comparison each is meant to be unlike the others.
        if self.context.keeps_state and (reasons := self._reasons(key)):
            self.context.bars.say(f"{key.stage}: recomputed: {reasons}")
            tracking.tag(self.run_id, {"kasa.made_anew_for": reasons})
        artifact = self.artifact(key, make)
        maker = artifact.facts["mlflow_run_id"]
        self.key, self.status = key.key, "reused" if artifact.reused else "computed"
        tracking.tag(
            self.run_id, {"kasa.status": self.status, "kasa.artifact": self.context.storage.address(artifact.folder)}
        )
        if maker != self.run_id:
            tracking.tag(self.run_id, {"kasa.reused_from": maker})
            tracking.describe(self.run_id, reuse_note(artifact, maker, tracking.page(maker)))
        return artifact

    def _reasons(self, key: StageKey) -> str:
        """Why the artifact is about to be made although the stage has made others."""
        if key.stage in self.context.recomputed:
            return "you asked for it"
        if self.context.store.find(key):
            return ""
        stored = stored_artifacts(self.context.store)
        return "; ".join(why_made(key, ingredients_by_name(stored), of_recipe(stored, self.context.recipe.name)))

    @property
    def must_publish(self) -> bool:
        """Whether the run still lacks what a stage logs: it made its artifact, now or before it was interrupted."""
        return self.status == "computed" or self.resumed


@contextmanager
def open_stage(context: RunContext, name: str) -> Iterator[StageRun]:
    """A stage's MLflow run; the stage finds or makes its artifacts within the block."""
    context.confirm()
    run_id, resumed = context.child_run(name)
    stage = StageRun(context, run_id, resumed)
    started = time.perf_counter()
    with context.tracking.open_run(run_id):
        context.tracking.tag(run_id, {"kasa.stage": name})
        yield stage
    seconds = time.perf_counter() - started
    context.finished.append(StageFacts(name, stage.status, seconds, stage.key, run_id))


def run_stage(context: RunContext, key: StageKey, make: Make, publish: Publish) -> Artifact:
    """A stage that makes one artifact, which is published unless it was reused."""
    with open_stage(context, key.stage) as stage:
        artifact = stage.main_artifact(key, make)
        if stage.must_publish:
            publish(stage.run_id, artifact)
    return artifact


def log_artifact(context: RunContext, run_id: str, path: Path, place: str | None = None) -> None:
    """Log a file or folder of an artifact; a large one as a small note that says where it lies (`reference`).

    Raises:
        WorkspaceError: it is not what the manifest of its artifact says.
    """
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    if size <= COPIED_BYTES:
        context.store.check(path)
        context.tracking.log_files(run_id, path, place)
        return
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / f"{path.name}.reference.json"
        facts = {**reference(path, size, context.store.root), "path": context.storage.address(path.resolve())}
        note.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        context.tracking.log_files(run_id, note, place)


def log_datasets(
    context: RunContext, run_id: str, sources: DataSources, prepared: Artifact, splits: Iterable[str]
) -> None:
    """Record splits of the prepared data as inputs of a run, under the digest of everything they were made from."""
    settings = context.recipe.data
    for split in splits:
        places = settings.heldout if split == "heldout" and settings.heldout else settings.train
        context.tracking.log_dataset(
            run_id,
            name=f"{context.recipe.name}-{split}",
            digest=sources.digest,
            source=", ".join(places),
            rows=prepared.facts[f"{split}_rows"],
            context=SPLITS[split],
        )


def reuse_note(artifact: Artifact, maker: str, page: str | None) -> str:
    """What the page of a run says of an artifact that another run made; `page` is where that run is shown, if anywhere."""
    run = f"[run {maker[:8]}]({page})" if page else f"run {maker}, which this store does not have"
    return f"Nothing was done here: the artifact `{artifact.stage}/{artifact.key}` was made by {run}."


def reference(path: Path, size: int, root: Path) -> dict[str, Any]:
    """The note that stands for a file or folder too large to be copied.

    Args:
        path: lies in an artifact, or anywhere else.
        size: in bytes.
        root: the folder of all artifacts.

    Returns:
        `path` (absolute), `bytes`, and, within an artifact, its `key` (STAGE/KEY) and `manifest_sha256`: the same digest
        of the same file means the same artifact.
    """
    note: dict[str, Any] = {"path": str(path.resolve()), "bytes": size}
    for folder in (path, *path.parents):
        if folder.parent.parent == root:
            digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
            return note | {"key": f"{folder.parent.name}/{folder.name}", "manifest_sha256": digest}
    return note


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
    work.context.check_inputs = work.base.check_unchanged
    work.context.inputs = work.base.as_found
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
