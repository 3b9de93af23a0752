"""Outlines of bases, kept by what the bases are made of: a run that finds everything made need not load torch to choose targets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from kasa.targets import Outline, Target
from pipeline.artifacts.store import code_digests, content_digest, package_versions
from pipeline.base.head import HeadKind
from pipeline.storage.whole_file import write_whole

_CODE = ["kasa.targets", "pipeline.base.outline", "pipeline.planning.model_shapes"]


def remembered_outline(folder: Path, base_digest: str, head: HeadKind, draw: Callable[[], Outline]) -> Outline:
    """The outline that `draw` gives, or gave when it was last asked for this base, head, transformers and code."""
    asked = {"base": base_digest, "head": head, **code_digests(_CODE), **package_versions(["transformers"])}
    file = folder / f"{content_digest(asked)[:16]}.json"
    if (known := _read(file)) is not None:
        return known
    outline = draw()
    write_whole(file, json.dumps(dataclasses.asdict(outline)))
    return outline


def _read(file: Path) -> Outline | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Outline(tuple(Target(**target) for target in kept["linear"]), kept["others"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
