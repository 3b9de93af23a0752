"""A change of code that may change a result changes the key, and no other change does: tried with every module there is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.recipe import Recipe, parse_recipe
from pipeline.core import code
from pipeline.core.code import CANNOT_MATTER, SourceTree
from pipeline.run import graph
from pipeline.run.dependencies import KeyInputs
from pipeline.run.graph import GRAPH, stage_keys
from tests.support import ROOT

# Where something is computed; in the rooms above, work is only started, kept and shown.
COMPUTING = ("kasa", "pipeline.data", "pipeline.metrics", "pipeline.models", "pipeline.methods", "pipeline.spectra",
             "pipeline.training", "pipeline.evaluation", "pipeline.serving")  # fmt: skip
# What a stage's own module imports of them without its result depending on it.
NO_RESULT = {
    ("prepare", "pipeline.evaluation.results"): "refuses data that the evaluation could not use",
    ("prepare", "pipeline.metrics.catalogue"): "refuses a metric that the classes do not allow",
}

TREE = SourceTree()


def recipe(**sections: object) -> Recipe:
    values = {"name": "tiny", "data": {"train": ["rows.jsonl"]}, "train": {"precision": "bf16"}}
    values |= {"adapter": {"truncation": "loss"}} | sections
    return parse_recipe(values, "recipe.yaml")


def variants() -> dict[str, KeyInputs]:
    """Runs and trials that between them use every branch of the graph."""
    of_method = {name: recipe(adapter={"method": name}) for name in ("lora", "corda", "full")}
    labels = recipe(base={"head": "classification"})
    harness = recipe(evaluate={"harness": {"tasks": ["arc_easy"]}})
    return {
        "run": KeyInputs(recipe()),
        "weight": KeyInputs(recipe(adapter={"truncation": "weight"})),
        "champion": KeyInputs(recipe(), champion="k"),
        "labels": KeyInputs(labels),
        "harness": KeyInputs(harness),
        "base": KeyInputs(recipe(), until="evaluate", trains=False),
        **{name: KeyInputs(made, until="evaluate") for name, made in of_method.items()},
    }


Place = tuple[str, str]


@pytest.fixture(scope="module")
def asked() -> dict[Place, tuple[list[str], list[str]]]:
    """The modules that the graph names, by variant and stage: with what they import, and alone."""
    found: dict[Place, tuple[list[str], list[str]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "code_digests", lambda entries, alone: {"entries": list(entries), "alone": list(alone)})
        for variant, inputs in variants().items():
            for stage, key in stage_keys(inputs).items():
                found[variant, stage] = key.ingredients["code"]["entries"], key.ingredients["code"]["alone"]
    return found


def codes(tree: SourceTree, asked, monkeypatch: pytest.MonkeyPatch) -> dict[Place, dict[str, str]]:
    """The code in the keys as it is in a tree."""
    monkeypatch.setattr(code, "_tree_of_this_process", lambda: tree)
    once = {repr(modules): code.code_digests(*modules) for modules in asked.values()}
    return {place: once[repr(modules)] for place, modules in asked.items()}


def reread(tree: SourceTree, module: str) -> None:
    """Forget what was read of a file; all others stay as they are, which makes this test quick."""
    for known in (tree._trees, tree._imports, tree._digests):
        known.pop(module, None)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for package in ("kasa", "pipeline"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def source(root: Path, module: str) -> Path:
    file = root.joinpath(*module.split(".")).with_suffix(".py")
    return file if file.exists() else file.with_suffix("") / "__init__.py"


def test_a_changed_constant_changes_the_keys_of_the_stages_that_run_it_and_no_other(copied, asked, monkeypatch) -> None:
    tree = SourceTree(copied)
    # A package without code is none of the modules that run.
    modules = [module for module in tree.modules() if tree.closure([module], without=tree.modules())]
    before = codes(tree, asked, monkeypatch)
    assert len(modules) > 100
    assert set().union(*before.values()) < set(modules)
    for module in modules:
        file = source(copied, module)
        text = file.read_text(encoding="utf-8")
        for added, matters in (("\n_ANOTHER_CONSTANT = 1\n", True), ("\n# A comment.\n'A text.'\n", False)):
            file.write_text(text + added, encoding="utf-8")
            reread(tree, module)
            after = codes(tree, asked, monkeypatch)
            changed = {place for place in before if before[place] != after[place]}
            assert changed == {place for place in before if matters and module in before[place]}, module
        file.write_text(text, encoding="utf-8")
        reread(tree, module)
    assert codes(tree, asked, monkeypatch) == before


def closures(asked, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """All modules that count for a stage in one variant or another."""
    found: dict[str, set[str]] = {stage.name: set() for stage in GRAPH}
    for (_, stage), counted in codes(TREE, asked, monkeypatch).items():
        found[stage] |= counted.keys()
    return found


@pytest.mark.parametrize(
    ("variant", "stage", "modules"),
    [
        ("weight", "spectra", {"pipeline.spectra.decomposition", "kasa.spectra", "kasa.checkpoint"}),
        ("run", "spectra", {"pipeline.models.forward", "kasa.calibration"}),
        ("run", "audit", {"pipeline.models.forward", "kasa.adapter", "kasa.audit"}),
        (
            "run",
            "train",
            {"pipeline.methods.kasa", "pipeline.methods.choice", "pipeline.config.deepspeed", "kasa.layer"},
        ),
        ("lora", "train", {"pipeline.methods.peft", "pipeline.methods.choice", "pipeline.training.worker"}),
        ("base", "evaluate", {"pipeline.models.forward", "pipeline.run.stages.evaluate", "pipeline.metrics.text"}),
        ("harness", "evaluate", {"pipeline.evaluation.harness"}),
    ],
)
def test_what_computes_is_covered(variant, stage, modules, asked, monkeypatch) -> None:
    assert modules <= codes(TREE, asked, monkeypatch)[variant, stage].keys()


@pytest.mark.parametrize(
    ("variant", "stage", "modules"),
    [
        ("weight", "spectra", {"pipeline.models.forward", "pipeline.data.prepare", "kasa.layer"}),
        ("full", "train", {"kasa.layer", "pipeline.methods.kasa", "pipeline.methods.peft"}),
        ("run", "train", {"pipeline.methods.peft", "pipeline.evaluation.worker"}),
        ("run", "evaluate", {"pipeline.evaluation.harness", "pipeline.training.worker"}),
    ],
)
def test_what_does_not_run_is_not(variant, stage, modules, asked, monkeypatch) -> None:
    assert modules.isdisjoint(codes(TREE, asked, monkeypatch)[variant, stage])


def test_what_a_stage_calls_on_the_driver_for_its_result_is_covered(asked, monkeypatch) -> None:
    tree, covered = TREE, closures(asked, monkeypatch)
    used = set()
    for stage in GRAPH:
        for module in tree.imports(stage.module):
            computes = any(module == room or module.startswith(f"{room}.") for room in COMPUTING)
            if not computes or module in covered[stage.name] or module in CANNOT_MATTER:
                continue
            if not tree.closure([module], without=tree.modules()):  # a package without code
                continue
            assert (stage.name, module) in NO_RESULT, (
                f"{stage.module} imports {module}, which does not count for its key: name it in the stage's `code` "
                "(`pipeline.run.graph`), or here, with the reason why the result does not depend on it"
            )
            used.add((stage.name, module))
    assert used == NO_RESULT.keys()


def test_every_exclusion_is_met_by_some_stage_and_says_why(asked) -> None:
    entries = {entry for with_imports, _ in asked.values() for entry in with_imports}
    for module, reason in CANNOT_MATTER.items():
        assert len(reason.split()) > 3, module
        assert module in TREE.closure(entries, without=CANNOT_MATTER.keys() - {module}), f"nobody imports {module}"


@pytest.mark.processes
def test_the_keys_are_made_in_no_time_and_without_what_the_workers_import() -> None:
    """In a process of its own, as in a command that finds nothing to do."""
    text = (
        "import sys, time; from pathlib import Path; from pipeline.config.recipe import load_recipe;"
        "from pipeline.run.graph import code_state; recipe = load_recipe(Path('quickstart'));"
        "began = time.process_time(); code_state(recipe); print(time.process_time() - began);"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, modules = done.stdout.splitlines()
    assert float(seconds) < 2  # about 0.3 s on two cores
    assert {"torch", "transformers", "ray", "mlflow", "deepspeed", "datasets", "numpy"}.isdisjoint(modules.split())
