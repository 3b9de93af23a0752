"""The checks: every `Check` at the top level of a module in this folder."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.core import Check


def all_checks() -> tuple[Check, ...]:
    """Every check, in the order of modules and, within one, of definition.

    Raises:
        ValueError: two checks have one name.
    """
    found: dict[str, Check] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, Check):
                if value.name in found:
                    raise ValueError(f"two checks are named {value.name}; the second is in {module.name}")
                found[value.name] = value
    return tuple(found.values())
