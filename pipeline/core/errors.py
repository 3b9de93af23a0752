"""The pipeline's branch of the exception tree rooted in `kasa.errors.KasaError`."""

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
    """A recipe cannot be sent to a cluster as a job."""


class ModelError(KasaError):
    """A model named on the command line (registry URI or adapter folder) cannot be loaded."""


class TrainingError(KasaError):
    """Training cannot go on for a reason the user can mend, such as a rate at which it diverges."""


class JudgeError(KasaError):
    """The judge of answers cannot be asked, or its words cannot be understood."""


class ConnectionLostError(Exception):
    """A service that answered before does so no longer; what it was asked to do may well go on."""


class WorkerError(Exception):
    """Worker processes died or failed: no mistake of the user's, so the exit code is 1."""


class LeaseLostError(Exception):
    """Another process has taken over what only one may do: no mistake of the user's, so the exit code is 1."""


class TrackingAwayError(Exception):
    """The tracking server stayed away for longer than is waited: no mistake of the user's, so the exit code is 1."""


class StorageError(Exception):
    """The store of a remote workspace failed in the middle of a run, for longer than is waited: the exit code is 1."""


def first_line(error: BaseException) -> str:
    """The type and the last line of an error's text, which in a chain of errors is the first cause."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
