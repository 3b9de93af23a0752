"""The code that a computation runs, found by following imports and digested by the syntax tree, and where it comes from.

The keys of the stages cover it, so that no result of older code is taken for one of the present code. Nothing is imported to
find it out, and nothing depends on comments, docstrings or formatting. The version of the code, the seeds and the user are
tags of a run in MLflow.
"""

from __future__ import annotations

import ast
import getpass
import hashlib
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

_GIT_PATIENCE_S = 20.0
_HERE = Path(__file__).resolve()

_PACKAGES = ("kasa", "pipeline")
# Modules (and packages, with all that is in them) that a computation imports and that cannot change its result; why.
# What they import is not followed either.
CANNOT_MATTER: Mapping[str, str] = {
    "kasa.errors": "texts of errors; whoever meets one has no result",
    "pipeline.core.errors": "texts of errors; whoever meets one has no result",
    "pipeline.core.redaction": "hides secrets in what is shown and stored; nothing is computed from it",
    "pipeline.core.code": "makes the keys, no results: with another digest a key differs anyway",
    "pipeline.config.settings": "checks the recipe; its values, derived ones included, are in the keys",
    "pipeline.data.sources": "finds and fetches files, which are in the keys by their bytes",
    "pipeline.models.embedded": "makes bases and data, which are in the keys by their bytes",
}
_Bound = dict[str, str]


def code_tags(module: Path = _HERE) -> dict[str, str]:
    """The digest of the code, and the commit it was checked out from, where it was: `kasa.code.*`.

    `kasa.code.dirty` says whether a tracked file differs from that commit. MLflow's own tag of the commit is set too; its
    pages show it.
    """
    tags = {"kasa.code.digest": source_digest()[:16]}
    # An installed copy may lie within somebody else's repository: only one that tracks this file is ours.
    if _git(module.parent, "ls-files", "--error-unmatch", module.name) is None:
        return tags
    commit = _git(module.parent, "rev-parse", "HEAD")
    changed = _git(module.parent, "status", "--porcelain", "--untracked-files=no", ":/")
    if commit is None or changed is None:
        return tags
    return tags | {
        "kasa.code.commit": commit,
        "kasa.code.dirty": str(bool(changed)).lower(),
        "mlflow.source.git.commit": commit,
    }


def user_name() -> str:
    """Who runs this, as the system knows them."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where there is no git, no repository, or no answer."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


_ROOT = Path(__file__).resolve().parents[2]


class SourceTree:
    """Packages of source files, each file read once.

    Args:
        root: the folder that the packages lie in.
        packages: their names; what is imported from elsewhere is not followed.
    """

    def __init__(self, root: Path = _ROOT, packages: Collection[str] = _PACKAGES) -> None:
        self._root = root
        self._packages = packages
        self._files: dict[str, Path | None] = {}
        self._trees: dict[str, ast.Module] = {}
        self._imports: dict[str, frozenset[str]] = {}
        self._digests: dict[str, str] = {}

    def modules(self) -> list[str]:
        """All modules of the packages, sorted."""
        files = (file for package in self._packages for file in (self._root / package).rglob("*.py"))
        names = (".".join(file.relative_to(self._root).with_suffix("").parts) for file in files)
        return sorted(name.removesuffix(".__init__") for name in names)

    def closure(self, entries: Iterable[str], without: Collection[str] = CANNOT_MATTER) -> set[str]:
        """The entries and all modules that they import, directly or through others, less those of `without`.

        Imports within functions count; those under `if TYPE_CHECKING` do not. A module comes with the packages it lies
        in, whose `__init__` is executed first, where they hold code.

        Raises:
            ModuleNotFoundError: there is no such entry.
        """
        found: set[str] = set()
        waiting = [(entry, True) for entry in entries]
        while waiting:
            module, is_entry = waiting.pop()
            if module in found or (not is_entry and _lies_in(module, without)):
                continue
            found.add(module)
            waiting += [(name, False) for name in self.imports(module)]
        return {module for module in found if self._holds_code(module)}

    def imports(self, module: str) -> frozenset[str]:
        """The modules of the packages that the module imports, and the packages that it lies in."""
        if module not in self._imports:
            parts = module.split(".")
            parents = {".".join(parts[:length]) for length in range(1, len(parts))}
            named = {name for node in _running_statements(self._tree(module)) for name in self._named(node)}
            self._imports[module] = frozenset((named | parents) - {module})
        return self._imports[module]

    def digest(self, module: str) -> str:
        """16 hexadecimal digits of SHA-256 over the module's syntax tree."""
        if module not in self._digests:
            parts: list[str] = []
            _canonical(self._tree(module), parts)
            # A string may hold half a surrogate pair, which UTF-8 has no bytes for.
            self._digests[module] = hashlib.sha256("".join(parts).encode(errors="backslashreplace")).hexdigest()[:16]
        return self._digests[module]

    def _tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            file = self._file(module)
            if file is None:
                raise ModuleNotFoundError(f"{self._root} holds no module {module}")
            self._trees[module] = ast.parse(file.read_bytes(), filename=str(file))
        return self._trees[module]

    def _file(self, module: str) -> Path | None:
        if module not in self._files:
            path = self._root.joinpath(*module.split("."))
            places = (path.with_suffix(".py"), path / "__init__.py")
            self._files[module] = next((file for file in places if file.is_file()), None)
        return self._files[module]

    def _holds_code(self, module: str) -> bool:
        return any(not _is_text(statement) for statement in self._tree(module).body)

    def _named(self, node: ast.AST) -> Iterator[str]:
        """The modules that an import statement names."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                if self._is_ours(alias.name):
                    yield alias.name
                    # Whatever is used of a package that hands its names out when they are asked for.
                    yield from self._handed_out(alias.name).values()
        elif isinstance(node, ast.ImportFrom) and node.module and self._is_ours(node.module):
            yield node.module
            for alias in node.names:
                if self._file(f"{node.module}.{alias.name}"):
                    yield f"{node.module}.{alias.name}"
                elif home := self._handed_out(node.module).get(alias.name):
                    yield home

    def _handed_out(self, package: str) -> _Bound:
        """Names that a package imports only when they are asked for (`kasa` does), each with its module.

        Type checkers have to be told of them, so they stand in the package's `if TYPE_CHECKING` block.
        """
        file = self._file(package)
        if file is None or file.name != "__init__.py":
            return {}
        return {
            alias.asname or alias.name: str(node.module)
            for statement in self._tree(package).body
            if isinstance(statement, ast.If) and _is_type_checking(statement.test)
            for node in statement.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def _is_ours(self, module: str) -> bool:
        return module.partition(".")[0] in self._packages


_tree_of_this_process = cache(SourceTree)


def code_digests(entries: Iterable[str], alone: Iterable[str] = ()) -> dict[str, str]:
    """The digest of each module that may decide what the entries compute, by the module's name.

    Args:
        entries: modules that run, with all they import (`SourceTree.closure`).
        alone: modules that count without what they import.
    """
    tree = _tree_of_this_process()
    return {module: tree.digest(module) for module in sorted(tree.closure(entries) | set(alone))}


def source_digest() -> str:
    """SHA-256 over every byte of our code, in hexadecimal: which version this is."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((_ROOT / package).rglob("*.py")):
            digest.update(f"{file.relative_to(_ROOT).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name."""
    return {package: version(package) for package in packages}


def _lies_in(module: str, packages: Collection[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _running_statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """All statements, those within functions too, but for those that only type checkers read."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.stmt):
            yield node
        # Expressions hold no statements: not to look into them is what makes this quick.
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            if not (name == "body" and isinstance(node, ast.If) and _is_type_checking(node.test)):
                waiting += getattr(node, name, ())


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _is_text(statement: ast.AST) -> bool:
    """Whether a statement is a string by itself: a docstring, mostly."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _canonical(node: ast.AST, parts: list[str]) -> None:
    """Append a tree as text: the same for every formatting, and, unlike `ast.dump`, for every version of Python that has
    the same nodes, since fields that hold nothing are left out."""
    parts.append(f"({type(node).__name__}")
    unread = node.body if isinstance(node, ast.If) and _is_type_checking(node.test) else None
    for name in node._fields:
        value = getattr(node, name, None)
        if value is None or value == [] or value is unread or name == "ctx":
            continue
        parts.append(f" {name}=")
        for item in value if isinstance(value, list) else (value,):
            if not isinstance(item, ast.AST):
                parts.append(f"{item!r},")
            elif not _is_text(item):
                _canonical(item, parts)
    parts.append(")")
