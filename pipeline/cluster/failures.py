"""What became of training workers, in words: when one fails, its peers fail after it, and only the first matters."""

from __future__ import annotations

from collections.abc import Mapping

from kasa.errors import KasaError
from pipeline.core.errors import WorkerError, cause_line

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "MemoryError", "OutOfMemory", "low on memory")
_REMEDY = "lower train.micro_batch_size, or set train.gradient_checkpointing or a higher ZeRO stage"


def error_of(failures: Mapping[int, Exception]) -> KasaError | WorkerError:
    """The error to report where training ended with `failures`, by rank."""
    for failure in failures.values():
        if isinstance(cause := _cause(failure), KasaError):
            return cause
    return WorkerError(in_words(failures))


def in_words(failures: Mapping[int, Exception]) -> str:
    """One line on the failure that brought the others about, with what to do where that is known."""
    _, rank = min((_order(failure), rank) for rank, failure in failures.items())
    failure = failures[rank]
    cause = _cause(failure)
    if isinstance(cause, WorkerError | KasaError):
        return str(cause)
    if _is_out_of_memory(failure):
        return f"training worker {rank} ran out of memory; {_REMEDY}"
    if _is_death(failure):
        return f"training worker {rank} died: it was killed, or its node is gone"
    if _is_lost_connection(failure):
        return f"training worker {rank} lost the connection to another, which was killed, or its node is gone"
    return f"training worker {rank} failed: {cause_line(cause)}"


def _order(failure: Exception) -> int:
    """A worker that names the one to blame comes first, then one that died, then any error but a lost connection."""
    if isinstance(_cause(failure), WorkerError | KasaError):
        return 0
    if _is_death(failure) or _is_out_of_memory(failure):
        return 1
    return 3 if _is_lost_connection(failure) else 2


def _is_death(failure: Exception) -> bool:
    return hasattr(failure, "health_check_failure")


def _is_lost_connection(failure: Exception) -> bool:
    return "connection" in str(failure).lower()


def _is_out_of_memory(failure: Exception) -> bool:
    return any(mark in str(failure) for mark in _OUT_OF_MEMORY)


def _cause(failure: Exception) -> BaseException:
    return getattr(failure, "cause", None) or failure
