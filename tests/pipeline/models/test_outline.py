"""Outlines of bases: drawn once, kept by content, and never a reason to fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kasa.errors import TargetError
from kasa.targets import Outline, Target, select_targets
from pipeline.models.base import remembered_outline

OUTLINE = Outline((Target("h.0.attn.q", 4, 6), Target("h.0.mlp.up", 8, 4, transposed=True)), {"h.0.norm": "RMSNorm"})


def test_an_outline_is_drawn_once_for_a_base_and_head(tmp_path: Path) -> None:
    drawn = []

    def draw() -> Outline:
        drawn.append(1)
        return OUTLINE

    for base, head in (
        ("a", "language-model"),
        ("a", "language-model"),
        ("a", "classification"),
        ("b", "language-model"),
    ):
        assert remembered_outline(tmp_path / "outlines", base, head, draw) == OUTLINE  # type: ignore[arg-type]
    assert len(drawn) == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"linear": [{"name": "q"}], "others": {}}', "one digit"])
def test_a_damaged_outline_is_drawn_anew(tmp_path: Path, damage: str) -> None:
    remembered_outline(tmp_path, "a", "language-model", lambda: OUTLINE)
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    width = re.search(r'"out_features": (\d+)', text)
    assert width
    file.write_text(text.replace(width[0], f"{width[0]}0") if damage == "one digit" else damage)
    assert remembered_outline(tmp_path, "a", "language-model", lambda: OUTLINE) == OUTLINE
    assert remembered_outline(tmp_path, "a", "language-model", pytest.fail) == OUTLINE


def test_targets_are_chosen_from_an_outline_as_from_the_model() -> None:
    assert [target.name for target in select_targets(OUTLINE, "all-linear")] == ["h.0.attn.q", "h.0.mlp.up"]
    assert [target.name for target in select_targets(OUTLINE, ["up"])] == ["h.0.mlp.up"]
    with pytest.raises(TargetError, match="'norm' is a RMSNorm, which cannot carry an adapter"):
        select_targets(OUTLINE, ["norm"])
