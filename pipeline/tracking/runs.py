"""Runs in MLflow: one parent run for each run of a recipe, one child for each of its stages.

Workers never open runs of their own: a run per rank or per restart would hide what belongs together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core import stopping
from pipeline.core.code import user_name
from pipeline.core.console import console
from pipeline.core.errors import TrackingAwayError
from pipeline.core.files import Record
from pipeline.core.redaction import redacted, redacted_values
from pipeline.tracking.availability import if_there, unavailable_reason
from pipeline.tracking.server import connect, own_database, own_files, tracking_uri

_PARENT_TAG = "mlflow.parentRunId"
_ORIGIN_TAG = "kasa.origin"
# The most that MLflow stores in one batch, in one parameter, and in the digest of a data set.
_BATCH = 500
_PARAMETER_LENGTH = 500
_DIGEST_LENGTH = 36
# Entries of a journal's record that are no metrics.
_NO_METRICS = {"step", "steps", "time_s"}

Target = TypeVar("Target")


class Tracking:
    """The runs of one experiment. Calls are retried while the store is unavailable, unless they say otherwise."""

    def __init__(self, workspace: Path, experiment: str) -> None:
        """Connect, and create the database and the experiment if they are missing.

        Raises:
            WorkspaceError: The store cannot be reached or written.
        """
        self.uri = tracking_uri(workspace)
        self._mlflow = connect(workspace)
        self.where = self._mlflow.where
        self.client = self._mlflow.MlflowClient()
        self._client_without_retries = self._mlflow.client_without_retries()
        self._experiment_id = self._mlflow.retry(lambda: self._experiment(experiment, workspace))

    def _experiment(self, name: str, workspace: Path) -> str:
        from mlflow.exceptions import MlflowException

        client = self._client_without_retries
        if found := client.get_experiment_by_name(name):
            if found.lifecycle_stage == "deleted":  # its name stays taken, and it takes no runs
                client.restore_experiment(found.experiment_id)
                console.print(f"the MLflow experiment {name} had been deleted; it is restored", markup=False)
            return str(found.experiment_id)
        place = own_files(workspace) if self.uri == own_database(workspace) else None
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException:
            # Another driver may have created it in the same moment.
            if found := client.get_experiment_by_name(name):
                return str(found.experiment_id)
            raise

    def retrying(self, registry: Target) -> Target:
        """A registry of the same store with its calls retried in the same way."""
        return self._mlflow.retrying(registry)

    def start_run(
        self, name: str, tags: Mapping[str, str], parent: str | None = None, origin: str | None = None
    ) -> str:
        """Create a run and return its id.

        Args:
            parent: The id of its parent run.
            origin: A text that is unique to what this run is for. If a run with this origin exists, created by a call whose
                reply was lost or by a process that died, its id is returned and no second run is created.
        """
        own = {
            **redacted_values(dict(tags)),
            "mlflow.runName": name,
            "mlflow.source.name": "kasa",
            "mlflow.user": user_name(),
        }
        if parent:
            own[_PARENT_TAG] = parent
        if origin is None:
            return str(self.client.create_run(self._experiment_id, tags=own).info.run_id)
        return self._mlflow.retry(lambda: self._find_or_create(origin, own))

    def _find_or_create(self, origin: str, tags: Mapping[str, str]) -> str:
        wanted = f"tags.`{_ORIGIN_TAG}` = '{origin}'"
        found = self._client_without_retries.search_runs([self._experiment_id], wanted, max_results=1)
        if found:
            return str(found[0].info.run_id)
        made = self._client_without_retries.create_run(self._experiment_id, tags={**tags, _ORIGIN_TAG: origin})
        return str(made.info.run_id)

    def resume_run(self, run_id: str) -> bool:
        """Set an interrupted run to RUNNING again. Returns False if the store no longer has it, or somebody deleted it."""
        found = if_there(lambda: self.client.get_run(run_id))
        if found is None or found.info.lifecycle_stage == "deleted":
            return False
        self.client.update_run(run_id, status="RUNNING")
        return True

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run with the status `FINISHED`, `FAILED` or `KILLED`."""
        self.client.set_terminated(run_id, status)

    def page(self, run_id: str) -> str | None:
        """The link from any of MLflow's pages to that of a run; None if the store does not have the run."""
        found = if_there(lambda: self.client.get_run(run_id))
        return f"#/experiments/{found.info.experiment_id}/runs/{run_id}" if found else None

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        for key, value in tags.items():
            self.client.set_tag(run_id, key, redacted(value))

    def describe(self, run_id: str, text: str) -> None:
        """Set the description on a run's page, in Markdown."""
        self.client.set_tag(run_id, "mlflow.note.content", redacted(text))

    def log_parameters(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Log nested settings as flat, searchable parameters such as `train.learning_rate`. Known ones are skipped."""
        from mlflow.entities import Param

        flat = {key: _shortened(value) for key, value in _flatten(values)}
        known = self.client.get_run(run_id).data.params
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(new), 100):
            self.client.log_batch(run_id, params=new[start : start + 100])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log the metrics of one step."""
        self._send(self.client, run_id, [{**metrics, "step": step}])

    def deliver(
        self, run_id: str, series: str, records: Sequence[Record], *, after: int | None = None, retries: bool = True
    ) -> int:
        """Log the journal records that the run does not have yet, in the order of their steps.

        Steps arrive whole and in order, so the newest step of one metric says which records the run has. A record that is
        sent twice because a reply was lost gives one point: it carries its own time, by which the store recognises it.

        Args:
            series: A metric that every record has.
            records: Each has a `step`, and the time `time_s` (seconds since 1970) if it is known.
            after: The newest step that the run has, if the caller knows it; otherwise the store is asked.
            retries: Whether calls are retried while the store is unavailable.

        Returns:
            The newest step that the run has now.
        """
        client = self.client if retries else self._client_without_retries
        if after is None:
            after = max((point.step for point in client.get_metric_history(run_id, series)), default=-1)
        new = {record["step"]: record for record in records if record["step"] > after}
        self._send(client, run_id, [new[step] for step in sorted(new)])
        return max(new, default=after)

    def _send(self, client: Any, run_id: str, records: Sequence[Record]) -> None:
        for batch in _batches([_metrics(record) for record in records]):
            client.log_batch(run_id, metrics=batch)

    def log_files(self, run_id: str, path: Path, place: str | None = None) -> None:
        """Log a file or a folder as artifacts of a run, in the artifact folder `place`."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), place)
        else:
            self.client.log_artifact(run_id, str(path), place)

    def log_dataset(self, run_id: str, name: str, digest: str, source: str, rows: int, context: str) -> None:
        """Record a data set as an input of a run, under the digest of its whole content.

        MLflow's own `mlflow.data` digests cover the first 10,000 rows only.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:_DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": redacted(source)}),
            profile=json.dumps({"num_rows": rows, "sha256": digest}),
        )
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    @contextmanager
    def open_run(self, run_id: str) -> Iterator[None]:
        """End the run at the end of the block: FINISHED, KILLED after Ctrl-C or SIGTERM, FAILED after any other exception.

        After an exception nothing is retried: if the server is unavailable, the run stays RUNNING, to be resumed.
        """
        try:
            with stopping.otherwise(partial(self._end_without_retries, run_id, "KILLED")):
                yield
        except TrackingAwayError:
            raise
        except BaseException as error:
            killed = isinstance(error, KeyboardInterrupt) or stopping.requested()
            self._end_without_retries(run_id, "KILLED" if killed else "FAILED")
            raise
        self.end_run(run_id)

    def _end_without_retries(self, run_id: str, status: str) -> None:
        try:
            self._client_without_retries.set_terminated(run_id, status)
        except Exception as error:
            if unavailable_reason(error) is None:
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
    """Batches of as many whole steps as fit. MLflow stores a batch as a whole or not at all."""
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
    text = redacted(str(value))
    return text if len(text) <= _PARAMETER_LENGTH else text[: _PARAMETER_LENGTH - 1] + "…"
