"""The pipeline's branch of the exception tree rooted in `kasa.errors.KasaError`, and errors as one line of text.

A `KasaError` is a mistake that the user can correct: the command ends with exit code 2 and the message alone. The
exceptions that are none (`WorkerError` and those after it) are failures of machines and services: exit code 1.
"""

from __future__ import annotations

import errno
import os

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


# What a person can mend of what the system refuses, in words that follow the path.
_MENDABLE = {
    errno.ENOSPC: "cannot be written: there is no space left; free some and run the same command again",
    errno.EDQUOT: "cannot be written: the disk quota is used up; free some space and run the same command again",
    errno.EROFS: "cannot be written: its file system is read-only; name another place",
    errno.EACCES: "may not be read or written by this user; change its permissions, or name another place",
    errno.EPERM: "may not be changed by this user; name another place",
    errno.ENOENT: "does not exist, and cannot be made there",
    errno.ESTALE: "is gone: its file system was taken away; mount it and run the same command again",
    errno.ENOTDIR: "cannot be: a part of this path is a file, not a folder",
    errno.EISDIR: "is a folder, where a file is expected",
    errno.EEXIST: "is there already, and is no folder; name another place",
    errno.ENAMETOOLONG: "has too long a name for its file system",
    errno.ELOOP: "leads in a circle of symbolic links",
    errno.EMFILE: "cannot be opened: this process may open no more files; raise the limit (ulimit -n)",
}
_NO_SPACE = ("database or disk is full", "no space left on device")


def mendable(error: BaseException) -> KasaError | None:
    """What the system refused a command, as a mistake that the user can mend; None where it is something else.

    No space counts whatever wraps it: libraries and databases have errors of their own for it.
    """
    if isinstance(error, OSError) and error.errno in _MENDABLE:
        return WorkspaceError(f"{_path_of(error) or 'a file of this command'} {_MENDABLE[error.errno]}")
    link: BaseException | None = error
    seen = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        full = isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(mark in str(link).lower() for mark in _NO_SPACE):
            path = _path_of(link) if isinstance(link, OSError) else None
            return WorkspaceError(f"{path or 'a file or database of this run'} {_MENDABLE[errno.ENOSPC]}")
        link = link.__cause__ or link.__context__
    return None


def _path_of(error: OSError) -> str | None:
    path = error.filename2 or error.filename
    return os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else None


def one_line(error: object, limit: int = 300) -> str:
    """The text of an error or warning with its white space collapsed, cut after `limit` characters.

    If it has no text, the name of its type.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__


def cause_line(error: BaseException) -> str:
    """An error's type and the last line of its text. Ray puts the traceback of a worker first and the cause last."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
