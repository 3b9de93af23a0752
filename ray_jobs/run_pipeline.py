"""Run a recipe as a Ray job.

    ray job submit --working-dir . -- python -m ray_jobs.run_pipeline RECIPE.yaml workspace=/shared/kasa [--json]

The arguments are those of `kasa run`. Ray sets RAY_ADDRESS in a job's environment, so the stages run on that cluster;
the workspace must be on storage that all its nodes share. Submitting the same recipe again resumes the run.
"""

from __future__ import annotations

import sys

from pipeline.cli.start import start


def run_job() -> None:
    """Hand the job's arguments to `kasa run`."""
    sys.argv[1:1] = ["run"]
    start()


if __name__ == "__main__":
    run_job()
