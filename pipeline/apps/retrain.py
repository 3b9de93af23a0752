"""`kasa retrain`: run a recipe if its data, base, settings or code have changed; one retraining at a time.

A scheduler calls it again and again, so a call with nothing to do must be cheap: this module and what it imports load neither
torch nor Ray nor MLflow (a test checks that), and files that have not changed are not read (`pipeline.core.files`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kasa.errors import DamagedFileError
from kasa.files import read_sealed_json, sealed_json
from pipeline.config.recipe import Recipe, recipe_values
from pipeline.core.console import ProgressBars, console
from pipeline.core.files import atomic_write, content_digest, read_digests
from pipeline.data.remote import look_for_newest
from pipeline.data.sources import resolve_sources
from pipeline.models.base import find_folder, folder_digest
from pipeline.run import graph as keys
from pipeline.run.context import ready_workspace
from pipeline.storage.lease import FileLeaseStore, Holder, Lease, acquire, released_after
from pipeline.storage.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.run.flow import RunResult

_POLL_S = 2.0


@dataclass(frozen=True)
class Inputs:
    """Digests of everything that a retraining depends on, in the order in which changes are named."""

    data: str
    base: str
    recipe: str
    code: str


@dataclass(frozen=True)
class Finished:
    """The last retraining that finished.

    Attributes:
        at: its end, as ISO 8601 in UTC.
        inputs: as they were before it began; data that arrived meanwhile is new to the next one.
        run_id: its parent run in MLflow.
        model: URI of the version that it registered.
        promoted: whether that version became the champion.
        reason: the gate's reason.
    """

    at: str
    inputs: Inputs
    run_id: str
    model: str
    promoted: bool
    reason: str


@dataclass(frozen=True)
class Outcome:
    """The result of one call.

    Attributes:
        status: `unchanged`, `held` by another process, or `retrained`.
        reason: of that, in words.
        last: the last retraining that finished, this one included.
        result: of the run, if there was one.
    """

    status: str
    reason: str
    last: Finished | None
    result: RunResult | None = None


def retrain_if_new(recipe: Recipe, wait: bool = False) -> Outcome:
    """Retrain if anything is new since the last retraining that finished.

    Args:
        recipe: what to run. A workspace runs one retraining of each recipe name at a time.
        wait: whether to wait for another process that is retraining, and check again after it.

    Raises:
        KasaError: as in `pipeline.run.flow.run`; the retraining is not recorded, and the next one resumes it.
        LeaseLostError: this process slept so long that another took over; from then on the registry was not changed.
    """
    storage = ready_workspace(recipe)
    storage.load(_record(recipe))
    if done := _nothing_to_do(recipe):
        return done
    lease = _acquired(recipe, storage, wait)
    storage.load(_record(recipe))
    if isinstance(lease, Holder):
        return Outcome("held", f"another retraining is running ({lease})", read_finished(recipe))
    with released_after(lease):
        # Checked again: the process that was waited for may have done everything, and files may have arrived.
        inputs = look(recipe)
        last = read_finished(recipe)
        why = what_is_new(last.inputs if last else None, inputs)
        if last and not why:
            return _unchanged(last)
        console.print(f"retraining: {why}", soft_wrap=True)
        return _run(recipe, storage, inputs, why, lease.confirm)


def what_is_new(before: Inputs | None, now: Inputs) -> str:
    """The changes from one set of inputs to the next, in words; empty where there is none."""
    if before is None:
        return "there is no finished retraining yet"
    old, new = asdict(before), asdict(now)
    changed = [f"the {name}" for name in new if old[name] != new[name]]
    return f"new: {', '.join(changed)}" if changed else ""


def look(recipe: Recipe) -> Inputs:
    """Digests of the current inputs; newer revisions of hub data sets are fetched.

    Raises:
        DataError, BaseModelError, WorkspaceError: an input is missing or cannot be read or stored.
    """
    look_for_newest(recipe.data, recipe.workspace)
    digests = read_digests(recipe.workspace / "retrain" / "digests.json")
    sources = resolve_sources(recipe.data, recipe.workspace, digest=digests.digest)
    folder = find_folder(recipe.base, recipe.workspace)
    assert sources is not None
    assert folder is not None
    base = folder_digest(folder, digests.digest)
    digests.save()
    values = recipe_values(recipe)
    del values["workspace"]  # a workspace that was moved, record and all, is no change
    return Inputs(sources.digest, base, content_digest(values), content_digest(keys.code_state(recipe)))


def read_finished(recipe: Recipe) -> Finished | None:
    """The last retraining of this name that finished; None if there is none, or its record is damaged."""
    file = _record(recipe)
    try:
        values = read_sealed_json(file)
        return Finished(**{**values, "inputs": Inputs(**values["inputs"])})
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        console.print(f"{error}; so it counts as not done", markup=False, soft_wrap=True)
        return None


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """The values of an outcome for JSON, without those of its run."""
    return {
        "status": outcome.status,
        "reason": outcome.reason,
        "last": asdict(outcome.last) if outcome.last else None,
    }


def _nothing_to_do(recipe: Recipe) -> Outcome | None:
    last = read_finished(recipe)
    return _unchanged(last) if last and not what_is_new(last.inputs, look(recipe)) else None


def _unchanged(last: Finished) -> Outcome:
    return Outcome("unchanged", f"same data, base, recipe and code as at the retraining of {last.at}", last)


def _acquired(recipe: Recipe, storage: Workspace, wait: bool) -> Lease | Holder:
    store = storage.lease_store(f"retrain/leases/{recipe.name}") or FileLeaseStore(
        recipe.workspace / "retrain" / "leases", recipe.name
    )
    found = acquire(store)
    if isinstance(found, Holder) and wait:
        console.print(f"waiting for another retraining ({found})", soft_wrap=True)
        while isinstance(found, Holder):
            time.sleep(_POLL_S)
            found = acquire(store)
    return found


def _run(recipe: Recipe, storage: Workspace, inputs: Inputs, why: str, confirm: Callable[[], None]) -> Outcome:
    from pipeline.run.flow import run  # torch, Ray and MLflow

    result = run(recipe, ProgressBars(), confirm=confirm)
    confirm()
    decision = result.registration.decision
    finished = Finished(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        inputs=inputs,
        run_id=result.parent_run,
        model=result.registration.model.uri,
        promoted=decision.promote,
        reason=decision.reason,
    )
    file = _record(recipe)
    atomic_write(file, sealed_json(asdict(finished)))
    storage.save(file)
    return Outcome("retrained", why, finished, result)


def _record(recipe: Recipe) -> Path:
    return recipe.workspace / "retrain" / f"{recipe.name}.json"
