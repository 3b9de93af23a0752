"""The exception tree: everything a user can put right is a `KasaError` with a message saying what, where and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Nobody mistypes a longer name, and the search takes time with its square.
_LONGEST = 100


class KasaError(Exception):
    """A mistake the user can correct; the command line prints its message alone and exits with code 2."""


class TargetError(KasaError):
    """A target module pattern matches nothing, or a target cannot carry an adapter of the wanted rank."""


class SpectrumError(KasaError):
    """A weight has no usable singular spectrum (NaN, Inf), or a spectrum belongs to another weight."""


class AdapterFileError(KasaError):
    """An adapter folder is incomplete, damaged, or made for another base."""


class DamagedFileError(KasaError):
    """A file cannot be read, or is not what was written."""


class InterchangeError(KasaError):
    """An adapter cannot be written in the wanted format or place, or a foreign folder cannot be taken over as it is."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint naming the candidates closest to `name`, for the end of an error message; empty where none is close."""
    close = difflib.get_close_matches(name[:_LONGEST], list(candidates), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
