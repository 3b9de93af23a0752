"""A form of rows that lies in the user's own code: `data.form: package.module:function`.

The function takes a row, an object of its columns, and returns a conversation as OpenAI writes it: a list of messages, or an object
of `messages`, `tools` and `system`. It may raise `ValueError` with the reason why a row cannot be used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.core.errors import DataError, RecipeError, one_line
from pipeline.data.conversations import chat_turns, with_system, with_tools
from pipeline.data.fields import RowError
from pipeline.models.chat import Message

Function = Callable[[dict[str, Any]], Any]


def is_own(form: str) -> bool:
    """Whether a form names a function of the user's."""
    return ":" in form


def own_form_digest(form: str) -> str:
    """SHA-256 of the file with the function, in hexadecimal. The module is not run, though packages around it are.

    Raises:
        RecipeError: there is no such module here, or it is no file of Python source.
    """
    module, _, function = form.partition(":")
    try:
        spec = find_spec(module) if module and function.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise RecipeError(
            f"data.form: {form!r} names no function of a Python file, as package.module:function does, that can be found "
            "here; install its package, or put its folder into PYTHONPATH"
        )
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def own_function(form: str) -> Function:
    """The function of a form.

    Raises:
        DataError: it cannot be imported in this process.
    """
    module, _, name = form.partition(":")
    try:
        function: Function = getattr(import_module(module), name)
    except Exception as error:  # the module is the user's, and may raise anything
        raise DataError(
            f"data.form {form}: it cannot be imported where rows are read ({type(error).__name__}: {one_line(error)}); "
            "install its package on every machine of the cluster"
        ) from None
    if not callable(function):
        raise DataError(f"data.form {form}: it is no function but {type(function).__name__}")
    return function


def own_turns(form: str, function: Function, values: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns of a row.

    Raises:
        RowError: the function raises, or returns what is no conversation.
    """
    try:
        found = function(dict(values))
    except ValueError as error:
        raise RowError(one_line(error)) from None
    except Exception as error:  # one row may be wrong in a way that its author did not think of
        raise RowError(f"{form} fails: {type(error).__name__}: {one_line(error)}") from None
    row = {"messages": found} if isinstance(found, list) else found
    if not isinstance(row, dict):
        raise RowError(f"{form} returned neither a list of messages nor an object with one, but {type(found).__name__}")
    return with_tools(with_system(chat_turns(row), row), row)
