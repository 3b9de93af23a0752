"""What is said of methods: never more than the interval and Holm's test allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.apps.compare import Compared
from pipeline.apps.compared_methods import ChosenRate, ComparisonPlan
from pipeline.apps.comparison_analysis import MethodResult, findings, findings_json, markdown, verdict, write_comparison
from pipeline.cli.compare import show_compared
from pipeline.metrics.intervals import Interval

COSTS = {
    "trainable_parameters": 3096.0,
    "start_s": 1.5,
    "tokens_per_second": 900.0,
    "memory_gib": 0.5,
    "adapter_mib": 0.1,
}


def runs(share: float, seeds: int, seed: int, samples: int = 200) -> list[list[dict[str, Any]]]:
    # The samples' own difficulty is common to all methods.
    hard = np.random.default_rng(0).random(samples)
    generator = np.random.default_rng(seed)
    return [
        [
            {"sample": i, "exact_match": float(h + 0.02 * generator.normal() < share), "loss_sum": 2.0, "tokens": 2}
            for i, h in enumerate(hard)
        ]
        for _ in range(seeds)
    ]


def found(**changes: Any) -> Any:
    seeds = changes.get("seeds", 3)
    ran = [
        MethodResult("base", runs(0.1, 1, 1)),
        MethodResult("lora", runs(0.5, seeds, 2), COSTS, 8, 1e-3, changes.get("chosen")),
        MethodResult("kasa", runs(changes.get("kasa", 0.5), seeds, 3), COSTS, 8, 1e-3),
        *changes.get("more", []),
    ]
    return findings(ran, "exact_match", ["exact_match", "loss"], "lora", seeds)


def row(comparison: Any, name: str) -> Any:
    return next(one for one in comparison.rows if one.result.name == name)


@pytest.mark.parametrize(
    ("interval", "p", "lower", "expected"),
    [
        (Interval(1.0, 0.5, 1.5), 0.01, False, "better"),
        (Interval(1.0, 0.5, 1.5), 0.01, True, "worse"),
        (Interval(-1.0, -1.5, -0.5), 0.01, False, "worse"),
        (Interval(1.0, -0.1, 1.5), 0.01, False, "not told apart"),
        (Interval(1.0, 0.0, 1.5), 0.01, False, "not told apart"),
        (Interval(1.0, 0.5, 1.5), 0.06, False, "not told apart"),
    ],
)
def test_verdicts(interval: Interval, p: float, lower: bool, expected: str) -> None:
    assert verdict(interval, p, lower) == expected


def test_equal_methods_are_not_told_apart_and_the_page_says_what_could_have_gone_unseen() -> None:
    comparison = found()
    assert row(comparison, "kasa").verdict == "not told apart"
    assert row(comparison, "base").verdict == "worse"
    assert row(comparison, "lora").difference is None
    assert "worse than lora: base" in comparison.conclusion
    assert "not told apart from lora: kasa" in comparison.conclusion
    assert "better" not in comparison.conclusion
    assert any("could have gone unseen" in limit for limit in comparison.limits)
    assert any("--tune lr" in limit for limit in comparison.limits)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict", "said"),
    [
        ([1.0] * 4, [0.0] * 4, "not told apart", "4 held-out samples tell no methods apart"),
        ([1.0] * 4, [1.0] * 4, "not told apart", "4 held-out samples tell no methods apart"),
        ([1.0] * 40, [1.0] * 40, "not told apart", "Not one of the 40 held-out samples differs"),
        ([1.0] * 40, [0.0] * 40, "better", "What holds on these data"),
    ],
)
def test_few_or_equal_samples_say_what_they_do_not_show(ours, theirs, verdict, said) -> None:
    ran = [
        MethodResult(name, [[{"sample": n, "exact_match": right} for n, right in enumerate(scores)]], COSTS)
        for name, scores in (("lora", theirs), ("kasa", ours))
    ]
    comparison = findings(ran, "exact_match", ["exact_match"], "lora", 1)
    assert row(comparison, "kasa").verdict == verdict
    assert any(said in limit for limit in comparison.limits)
    assert not any("gone unseen" in limit for limit in comparison.limits)


def test_a_clear_lead_is_called_one() -> None:
    comparison = found(kasa=0.8)
    assert row(comparison, "kasa").verdict == "better"
    assert comparison.conclusion.startswith(
        "By Exact match over 200 held-out samples and 3 seeds, better than lora: kasa (+"
    )


def test_one_seed_is_said_to_be_one() -> None:
    assert any("another seed may turn the order round" in limit for limit in found(seeds=1).limits)


def test_a_rate_at_the_edge_is_named() -> None:
    comparison = found(chosen=ChosenRate(1e-3, {1e-4: 2.0, 1e-3: 1.0}, True))
    assert any("of lora lies at the edge" in limit for limit in comparison.limits)


def test_a_method_that_diverged_is_in_the_table_without_a_result() -> None:
    comparison = found(more=[MethodResult("full", [], failure="loss is NaN in step 3")])
    assert any("full has no result: loss is NaN in step 3" in limit for limit in comparison.limits)
    assert "no result" in markdown("x-1", _recipe(), comparison)
    assert findings_json(comparison)["methods"]["full"]["difference"] is None


def test_the_folder(tmp_path: Path) -> None:
    write_comparison(tmp_path, "x-1", _recipe(), found())
    assert {file.name for file in tmp_path.iterdir()} == {f"comparison.{kind}" for kind in ("md", "json", "svg", "png")}
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert values["methods"]["kasa"]["difference"]["verdict"] == "not told apart"
    assert values["methods"]["kasa"]["costs"] == COSTS
    page = (tmp_path / "comparison.md").read_text()
    head = next(line for line in page.splitlines() if line.startswith("| method"))
    lines = [line for line in page.splitlines() if line.startswith(("| kasa", "| lora", "| base")) and "3,096" in line]
    assert len(lines) == 2
    assert {line.count("|") for line in lines} == {head.count("|")}
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def _recipe() -> Any:
    from pipeline.config.recipe import parse_recipe

    return parse_recipe({"name": "x", "data": {"train": "rows.jsonl"}}, "recipe")


def test_a_narrow_terminal_loses_no_figure(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    comparison = found(kasa=0.9, more=[MethodResult("kasa-without-d", runs(0.5, 3, 4), COSTS, 8, 1e-3)])
    plan = ComparisonPlan(recipe(), (), (0, 1, 2), (), "lora")
    show_compared(Compared(plan, comparison, Path("folder"), 10, 0, "run"))
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert shown.count("3,096") == 3
    assert shown.count("kasa-without-d ") == 3
