"""Which modules a computation runs, and what of their text is code."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from pipeline.core.code import SourceTree


@pytest.fixture
def write(tmp_path: Path):
    """`write(module="text")` makes a package `ours` of the modules and reads it; `packages` are those within, by name."""

    def build(packages: dict[str, str] | None = None, **modules: str) -> SourceTree:
        files = {f"{name.replace('.', '/')}.py": text for name, text in modules.items()}
        files |= {f"{name.replace('.', '/')}/__init__.py": text for name, text in (packages or {}).items()}
        for name, text in {"__init__.py": "", **files}.items():
            file = tmp_path / "ours" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(dedent(text))
        return SourceTree(tmp_path, ["ours"])

    return build


def test_a_closure_holds_what_is_imported_anywhere_but_for_type_checkers(write) -> None:
    tree = write(
        a="""
            from __future__ import annotations
            import json
            from typing import TYPE_CHECKING
            from ours.b import x
            if TYPE_CHECKING:
                from ours.typed import X
            def lazily() -> None:
                if x:
                    from ours import c
            class Some:
                def method(self) -> None:
                    try:
                        import ours.d
                    except ImportError:
                        pass
        """,
        b="from ours.e import y\nx = 1",
        c="x = 1",
        d="x = 1",
        e="from ours.a import z\ny = 1",
        typed="X = int",
        other="x = 1",
    )
    assert tree.closure(["ours.a"]) == {f"ours.{name}" for name in "abcde"}
    assert tree.closure(["ours.b"], without=["ours.e"]) == {"ours.b"}


def test_packages_count_where_they_hold_code(write) -> None:
    modules = {"folder.part": "x = 1", "folder.deep.part": "x = 1"}
    packages = {"folder": '"""Text."""', "folder.deep": "limit = 3"}
    tree = write(packages, **modules, a="from ours.folder.deep.part import x")
    assert tree.closure(["ours.a"]) == {"ours.a", "ours.folder.deep", "ours.folder.deep.part"}


def test_names_that_a_package_hands_out_lead_to_their_modules(write) -> None:
    package = """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from ours.lazy.first import one
            from ours.lazy.second import two
        def __getattr__(name): ...
    """
    parts = {"lazy.first": "one = 1", "lazy.second": "two = 2"}
    tree = write({"lazy": package}, **parts, a="from ours.lazy import one", b="import ours.lazy")
    assert tree.closure(["ours.a"]) == {"ours.a", "ours.lazy", "ours.lazy.first"}
    assert tree.closure(["ours.b"]) == {"ours.b", "ours.lazy", "ours.lazy.first", "ours.lazy.second"}


CODE = '''
def scaled(value: float) -> float:
    """What it does."""
    return value * 0.001
'''


@pytest.mark.parametrize(
    ("text", "is_same"),
    [
        ('"""A docstring."""\n' + CODE, True),
        (CODE.replace("What it does.", "Something else."), True),
        (CODE.replace('    """What it does."""\n', ""), True),
        (CODE.replace("0.001", "1e-3  # a comment"), True),
        (CODE.replace("value * 0.001", "(\n        value * 0.001\n    )"), True),
        (CODE + "\n\nif TYPE_CHECKING:\n    pass\n", False),
        (CODE.replace("0.001", "0.002"), False),
        (CODE.replace("0.001", "'0.001'"), False),
        (CODE.replace("*", "+"), False),
        (CODE.replace("scaled", "other"), False),
        (CODE.replace("value: float", "value: float = 1"), False),
        (CODE + "x = 1\n", False),
        (CODE.replace("return value", "return -value"), False),
    ],
)
def test_a_digest_follows_the_code_alone(write, text: str, is_same: bool) -> None:
    before = write(a=CODE).digest("ours.a")
    assert len(before) == 16
    assert (write(a=text).digest("ours.a") == before) is is_same


def test_where_a_value_stands_counts(write) -> None:
    kinds = [
        "x = [1, 2]",
        "x = (1, 2)",
        "x = [[1], 2]",
        "x = [1, [2]]",
        "x = f(1, b=2)",
        "x = f(1, c=2)",
        "x = f(1)(2)",
    ]
    assert len({write(a=text).digest("ours.a") for text in kinds}) == len(kinds)


def test_an_entry_that_is_not_there(write) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"no module ours\.absent"):
        write().closure(["ours.absent"])
