"""What stands in MLflow for an artifact that is too large to be copied, or that another run made.

Runs in MLflow: one parent for a run of the recipe, one child for each stage.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.errors import TrackingAwayError
from pipeline.core.journal import Record
from pipeline.core.provenance import user_name
from pipeline.tracking.server import absence, connect, own_database, tracking_uri

_PARENT_TAG = "mlflow.parentRunId"
_ORIGIN_TAG = "kasa.origin"
# What MLflow stores at most in one batch, one parameter, and a data set's digest.
_BATCH = 500
_PARAMETER_LENGTH = 500
_DIGEST_LENGTH = 36
# What a journal's record says beside its measures.
_NO_METRICS = {"step", "steps", "time_s"}

Target = TypeVar("Target")


class Tracking:
    """The runs of one experiment. Calls wait while the store is away, unless they say otherwise."""

    def __init__(self, workspace: Path, experiment: str) -> None:
        """Connect, creating the database and the experiment where they are missing.

        Raises:
            WorkspaceError: the store cannot be reached or written.
        """
        self.uri = tracking_uri(workspace)
        self._mlflow = connect(workspace)
        self.where = self._mlflow.where
        self.client = self._mlflow.MlflowClient()
        self._client_at_once = self._mlflow.client_at_once()
        self._experiment_id = self._mlflow.keep_trying(lambda: self._experiment(experiment, workspace))

    def _experiment(self, name: str, workspace: Path) -> str:
        client = self._client_at_once
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        own = self.uri == own_database(workspace)
        place = (workspace.resolve() / "mlartifacts").as_uri() if own else None
        return str(client.create_experiment(name, artifact_location=place))

    def waiting(self, registry: Target) -> Target:
        """The registry of the same store, with calls that wait for it just so."""
        return self._mlflow.waiting(registry)

    def start_run(
        self, name: str, tags: Mapping[str, str], parent: str | None = None, origin: str | None = None
    ) -> str:
        """Create a run and return its id.

        Args:
            origin: what the run is for, once and for all; a run that was made for it, by a call whose answer was lost or
                a process that died, is taken instead of a second one.
        """
        own = {**tags, "mlflow.runName": name, "mlflow.source.name": "kasa", "mlflow.user": user_name()}
        if parent:
            own[_PARENT_TAG] = parent
        if origin is None:
            return str(self.client.create_run(self._experiment_id, tags=own).info.run_id)
        return self._mlflow.keep_trying(lambda: self._find_or_create(origin, own))

    def _find_or_create(self, origin: str, tags: Mapping[str, str]) -> str:
        wanted = f"tags.`{_ORIGIN_TAG}` = '{origin}'"
        found = self._client_at_once.search_runs([self._experiment_id], wanted, max_results=1)
        if found:
            return str(found[0].info.run_id)
        made = self._client_at_once.create_run(self._experiment_id, tags={**tags, _ORIGIN_TAG: origin})
        return str(made.info.run_id)

    def resume_run(self, run_id: str) -> bool:
        """Set an interrupted run going again; False when the store no longer has it."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.update_run(run_id, status="RUNNING")
        except MlflowException:
            return False
        return True

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        """`FINISHED`, `FAILED` or `KILLED`."""
        self.client.set_terminated(run_id, status)

    def page(self, run_id: str) -> str | None:
        """Where MLflow's pages show a run, as a link from any of them; None when the store does not have it."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_run(run_id)
        except MlflowException:
            return None
        return f"#/experiments/{found.info.experiment_id}/runs/{run_id}"

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        for key, value in tags.items():
            self.client.set_tag(run_id, key, value)

    def describe(self, run_id: str, text: str) -> None:
        """Set the description on a run's page, Markdown."""
        self.client.set_tag(run_id, "mlflow.note.content", text)

    def log_parameters(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Nested settings as flat, searchable parameters: `train.learning_rate`."""
        from mlflow.entities import Param

        flat = {key: _shortened(value) for key, value in _flatten(values)}
        known = self.client.get_run(run_id).data.params
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(new), 100):
            self.client.log_batch(run_id, params=new[start : start + 100])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Metrics of one step."""
        self._send(self.client, run_id, [{**metrics, "step": step}])

    def deliver(
        self, run_id: str, series: str, records: Sequence[Record], *, after: int | None = None, at_once: bool = False
    ) -> int:
        """Log journal records that the run does not have yet, in the order of their steps; returns the newest step there.

        Steps arrive whole and in order, so that the newest step of one metric says what is there. A record sent twice,
        because an answer was lost, is one point: it carries its own time, and the store knows it again.

        Args:
            series: a metric that every record has.
            records: with a `step` each, and the time `time_s` (seconds since 1970) where it is known.
            after: the newest step that is there, where the caller knows; else the store is asked.
            at_once: raise what the store raises, do not wait for it.
        """
        client = self._client_at_once if at_once else self.client
        if after is None:
            after = max((point.step for point in client.get_metric_history(run_id, series)), default=-1)
        new = {record["step"]: record for record in records if record["step"] > after}
        self._send(client, run_id, [new[step] for step in sorted(new)])
        return max(new, default=after)

    def _send(self, client: Any, run_id: str, records: Sequence[Record]) -> None:
        for batch in _batches([_metrics(record) for record in records]):
            client.log_batch(run_id, metrics=batch)

    def log_files(self, run_id: str, path: Path, place: str | None = None) -> None:
        """Log a file or a folder as artifacts, under the folder `place`."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), place)
        else:
            self.client.log_artifact(run_id, str(path), place)

    def log_dataset(self, run_id: str, name: str, digest: str, source: str, rows: int, context: str) -> None:
        """Record a data set as an input of the run, under the digest of its whole content."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:_DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps({"num_rows": rows, "sha256": digest}),
        )
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    @contextmanager
    def open_run(self, run_id: str) -> Iterator[None]:
        """End the run when the block ends: FINISHED, KILLED on Ctrl-C, FAILED on any other exception.

        After an exception nobody waits for a server that is away: the run then stays RUNNING, to be gone on with.
        """
        try:
            yield
        except KeyboardInterrupt:
            self._end_at_once(run_id, "KILLED")
            raise
        except TrackingAwayError:
            raise
        except BaseException:
            self._end_at_once(run_id, "FAILED")
            raise
        self.end_run(run_id)

    def _end_at_once(self, run_id: str, status: str) -> None:
        try:
            self._client_at_once.set_terminated(run_id, status)
        except Exception as error:
            if absence(error) is None:
                raise


def _metrics(record: Record) -> list[Any]:
    from mlflow.entities import Metric

    moment = int(record.get("time_s", time.time()) * 1000)
    return [
        Metric(name, float(value), moment, int(record["step"]))
        for name, value in record.items()
        if name not in _NO_METRICS
    ]


def _batches(steps: Sequence[list[Any]]) -> Iterator[list[Any]]:
    """Whole steps, as many as fit; a batch is stored as a whole or not at all."""
    batch: list[Any] = []
    for metrics in steps:
        if batch and len(batch) + len(metrics) > _BATCH:
            yield batch
            batch = []
        batch = batch + metrics
    if batch:
        yield batch


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _PARAMETER_LENGTH else text[: _PARAMETER_LENGTH - 1] + "…"
