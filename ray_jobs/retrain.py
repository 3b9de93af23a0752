"""Retrain as a Ray job if something has changed.

    ray job submit --working-dir . -- python -m ray_jobs.retrain RECIPE.yaml workspace=/shared/kasa [--json]

The arguments are those of `kasa retrain`, which needs no Ray where nothing has changed. Data and workspace
must be on storage that all nodes of the cluster share.
"""

from __future__ import annotations

import sys

from pipeline.cli.start import start


def run_job() -> None:
    """Hand the job's arguments to `kasa retrain`."""
    sys.argv[1:1] = ["retrain"]
    start()


if __name__ == "__main__":
    run_job()
