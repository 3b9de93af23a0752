"""The pipeline's branch of the exception tree rooted in `kasa.errors.KasaError`, and errors as one line of text.

A `KasaError` is a mistake that the user can correct: the command ends with exit code 2 and the message alone. The
exceptions that are none (`WorkerError` and those after it) are failures of machines and services: exit code 1.
"""

from __future__ import annotations

from kasa.errors import KasaError


class RecipeError(KasaError):
    """The recipe, an override or a command line argument is wrong."""


class DataError(KasaError):
    """Training or held-out data cannot be read or used."""


class BaseModelError(KasaError):
    """The base model cannot be found, fetched or read."""


class WorkspaceError(KasaError):
    """The workspace cannot be written, is full, or holds something damaged."""


class ClusterError(KasaError):
    """The Ray cluster lacks what the recipe asks for."""


class JobError(KasaError):
    """A recipe cannot be submitted to a cluster as a job."""


class ModelError(KasaError):
    """A model named on the command line (registry URI or adapter folder) cannot be loaded."""


class TrainingError(KasaError):
    """Training cannot continue for a reason that the user can correct, such as a learning rate at which it diverges."""


class JudgeError(KasaError):
    """The judge model cannot be reached, or its answer cannot be parsed."""


class ConnectionLostError(Exception):
    """A service that answered before no longer does. What it was asked to do may still be running."""


class WorkerError(Exception):
    """Worker processes died or failed."""


class LeaseLostError(Exception):
    """Another process has taken over a lease that this one held."""


class TrackingAwayError(Exception):
    """The tracking server was unavailable for longer than its calls are retried."""


class StorageError(Exception):
    """The store of a remote workspace failed during a run, for longer than its requests are retried."""


def one_line(error: object, limit: int = 300) -> str:
    """The text of an error or warning with its white space collapsed, cut after `limit` characters.

    If it has no text, the name of its type.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__


def cause_line(error: BaseException) -> str:
    """An error's type and the last line of its text. Ray puts the traceback of a worker first and the cause last."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
