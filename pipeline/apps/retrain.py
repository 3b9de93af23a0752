"""`kasa retrain`: look at the data and the base; where something is new, run, gate and promote; one at a time.

To be called by a scheduler, so a tick with nothing to do must be cheap: this module and what it imports do without torch,
Ray and MLflow (a test says so), and files that have not changed are not read (`pipeline.core.files`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.recipe import Recipe, recipe_values
from pipeline.core.console import ProgressBars, console
from pipeline.core.errors import WorkspaceError
from pipeline.core.files import atomic_write, content_digest, read_digests
from pipeline.data.remote import look_for_newest
from pipeline.data.sources import resolve_sources
from pipeline.models.base import find_folder, folder_digest
from pipeline.run import graph as keys
from pipeline.run.state import ready_workspace
from pipeline.storage.lease import Holder, Lease, acquire, released_after
from pipeline.storage.lease_stores import FileLeaseStore
from pipeline.storage.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.run.flow import RunResult

_POLL_S = 2.0


@dataclass(frozen=True)
class Inputs:
    """Digests of all that a retraining depends on: in the order in which a change is named."""

    data: str
    base: str
    recipe: str
    code: str


@dataclass(frozen=True)
class Finished:
    """The last retraining that came to its end.

    Attributes:
        at: when, as ISO 8601 in UTC.
        inputs: what was found before it began: data that came in meanwhile is new to the next one.
        run_id, model, promoted, reason: its parent run in MLflow, the version it registered, and the gate's verdict.
    """

    at: str
    inputs: Inputs
    run_id: str
    model: str
    promoted: bool
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What became of a tick.

    Attributes:
        status: `unchanged`, `held` by another process, or `retrained`.
        reason: in words.
        last: the last retraining that finished, this one included.
        result: of the run, where there was one.
    """

    status: str
    reason: str
    last: Finished | None
    result: RunResult | None = None


def retrain_if_new(recipe: Recipe, wait: bool = False) -> Outcome:
    """Retrain if anything is new since the last retraining that finished.

    Args:
        recipe: what to run; one retraining at a time for each name in a workspace.
        wait: where another process is at it, wait for its end and look again.

    Raises:
        KasaError: as in `pipeline.run.flow.run`; the retraining is not recorded, and the next one goes on with it.
        LeaseLostError: this process slept until another took over; from then on the registry was not changed.
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
        # Again, for the holder that was waited for may have done it all, and files may have come in.
        inputs = look(recipe)
        last = read_finished(recipe)
        why = what_is_new(last.inputs if last else None, inputs)
        if last and not why:
            return _unchanged(last)
        console.print(f"retraining: {why}", soft_wrap=True)
        return _run(recipe, storage, inputs, why, lease.confirm)


def what_is_new(before: Inputs | None, now: Inputs) -> str:
    """What differs between two looks, in words; empty where nothing does."""
    if before is None:
        return "there is no finished retraining yet"
    old, new = asdict(before), asdict(now)
    changed = [f"the {name}" for name in new if old[name] != new[name]]
    return f"new: {', '.join(changed)}" if changed else ""


def look(recipe: Recipe) -> Inputs:
    """Digests of the inputs as they are now; newer revisions of hub data sets are fetched.

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
    del values["workspace"]  # where the record itself lies
    return Inputs(sources.digest, base, content_digest(values), content_digest(keys.code_state(recipe)))


def read_finished(recipe: Recipe) -> Finished | None:
    """The last retraining of this name that finished.

    Raises:
        WorkspaceError: its record is damaged.
    """
    file = _record(recipe)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return Finished(**{**values, "inputs": Inputs(**values["inputs"])})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise WorkspaceError(f"{file} is damaged; delete it, and the next retraining runs") from None


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """What became of a tick, as JSON values."""
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
    atomic_write(file, json.dumps(asdict(finished), indent=1))
    storage.save(file)
    return Outcome("retrained", why, finished, result)


def _record(recipe: Recipe) -> Path:
    return recipe.workspace / "retrain" / f"{recipe.name}.json"
