"""The code and the package versions that an artifact depends on, as digests."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path


def code_digests(modules: Iterable[str]) -> dict[str, str]:
    """16 hexadecimal digits of SHA-256 over each module's source (of every module in it, for a package)."""
    return {name: _code_digest(name) for name in modules}


def _code_digest(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    origin, digest = Path(spec.origin), hashlib.sha256()
    for source in sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name."""
    return {package: version(package) for package in packages}
