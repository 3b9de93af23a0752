"""What the extra `e2e` brings, the package pycocoevalcap and, in it, METEOR's jar: where it is here, or what is missing.

No numpy: the keys of stages ask this, and those are wanted where nothing is computed.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

PACKAGE = "pycocoevalcap"


def lacks_package() -> str | None:
    """What is missing here to measure CIDEr, with the remedy."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"the package {PACKAGE}: pip install 'kasa-pipeline[e2e]'"
    return None


def lacks_meteor() -> str | None:
    """What is missing here to measure METEOR, with the remedy."""
    if shutil.which("java") is None:
        return "a Java runtime (java on the PATH), such as Debian's default-jre-headless"
    return lacks_package()


def meteor_folder() -> Path:
    """Where METEOR's jar and its data lie; only where nothing is missing."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "meteor"
