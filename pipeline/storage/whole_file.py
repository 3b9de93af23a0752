"""Small files that are the old one or the new one, never a part of either."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file in one step, making its folder where there is none. Several may do so at once: the last one stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.new")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, file)
