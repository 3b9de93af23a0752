"""The machinery of the benchmarks, with stand-ins for what takes minutes."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import table
from benchmarks.__main__ import main
from benchmarks.checks import adapter_start, all_checks, quickstart
from benchmarks.core import (
    RESULTS,
    ROOT,
    CannotRunError,
    Check,
    Direction,
    Measurement,
    Record,
    Setting,
    check,
    judge,
    make_record,
    read_records,
    run_checks,
    write_record,
)
from benchmarks.inputs import copy_sources


def _environment() -> tuple[dict[str, str], dict[str, str]]:
    return {"processor": "Abacus | 9", "cores": "2", "gpus": "none"}, {"torch": "2.13.0"}


@check(bar=10, direction="at least", unit="points")
def enough(setting: Setting) -> Measurement:
    """More than enough."""
    return Measurement(12.5, {"rows": 3})


@check(bar=10, direction="at most", unit="s")
def too_slow(setting: Setting) -> Measurement:
    """Slower than it should be."""
    return Measurement(11)


@check(bar=1, direction="at least", unit="")
def crashing(setting: Setting) -> Measurement:
    """Never returns."""
    raise RuntimeError("the wheels came off")


@check(bar=1, direction="at least", unit="")
def elsewhere(setting: Setting) -> Measurement:
    """Needs what is not here."""
    raise CannotRunError("there is no second moon")


@check(bar=0, direction="more than", unit="points", uses_device=True)
def choosy(setting: Setting) -> Measurement:
    """Computes where it is told."""
    return Measurement(1.0, {"device": setting.device})


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    (tmp_path / "scratch").mkdir()
    return Setting(tmp_path / "workspace", tmp_path / "scratch")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


def _record(one: Check = enough, measurement: Measurement | None = None, **changes: Any) -> Record:
    setting = Setting(Path("workspace"), Path("scratch"))
    return replace(make_record(one, measurement or one.measure(setting), setting, _environment), **changes)


def test_a_record_says_what_was_measured_how_and_where(setting: Setting, results: Path) -> None:
    assert run_checks([enough], setting, results, _environment) == 0
    stored = json.loads((results / "enough.json").read_text(encoding="utf-8"))
    date = stored.pop("date")
    assert date.endswith("+00:00")
    assert stored == {
        "name": "enough",
        "what": "More than enough",
        "measured": 12.5,
        "bar": 10,
        "direction": "at least",
        "judges": "",
        "judged": 12.5,
        "met": True,
        "unit": "points",
        "command": "python -m benchmarks enough",
        "machine": _environment()[0],
        "versions": _environment()[1],
        "details": {"rows": 3},
    }
    assert read_records(results) == [Record(date=date, **stored)]


@pytest.mark.parametrize(
    ("direction", "below", "equal", "above"),
    [
        ("at least", False, True, True),
        ("more than", False, False, True),
        ("at most", True, True, False),
        ("less than", True, False, False),
    ],
)
def test_directions(direction: Direction, below: bool, equal: bool, above: bool) -> None:
    one = replace(enough, bar=2, direction=direction)
    assert [judge(one, Measurement(value))[1] for value in (1, 2, 3)] == [below, equal, above]


def test_another_number_than_the_figure_may_decide() -> None:
    one = replace(enough, bar=0, direction="more than", judges="lower end")
    record = _record(one, Measurement(3.0, judged=-0.5))
    assert (record.measured, record.judged, record.met) == (3.0, -0.5, False)


def test_a_flaw_misses_the_bar_and_is_recorded() -> None:
    record = _record(enough, Measurement(99, flaws=("train was computed, not reused",)))
    assert not record.met
    assert record.details["flaws"] == ["train was computed, not reused"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_a_crash(value: float, setting: Setting, results: Path) -> None:
    broken = replace(enough, measure=lambda _: Measurement(value))
    assert run_checks([broken], setting, results, _environment) == 1
    assert not list(results.glob("*"))


def test_a_newer_run_replaces_the_record(results: Path) -> None:
    write_record(_record(measured=1.0), results)
    path = write_record(_record(measured=2.0), results)
    assert [record.measured for record in read_records(results)] == [2.0]
    assert [file.name for file in results.iterdir()] == [path.name]


def test_an_interrupted_write_leaves_the_old_record_alone(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_record(_record(measured=1.0), results)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_record(_record(measured=2.0), results)
    assert path.read_bytes() == before
    assert [record.measured for record in read_records(results)] == [1.0]


def test_a_crash_stops_no_other_check(setting: Setting, results: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_checks([crashing, elsewhere, enough], setting, results, _environment) == 1
    assert [file.name for file in results.iterdir()] == ["enough.json"]
    said = capfd.readouterr()
    assert "crashing: crashed" in said.out
    assert "the wheels came off" in said.err
    assert "elsewhere: cannot run here: there is no second moon" in said.out


def test_a_crash_keeps_the_older_record(setting: Setting, results: Path) -> None:
    write_record(_record(name="crashing"), results)
    run_checks([crashing], setting, results, _environment)
    assert [record.name for record in read_records(results)] == ["crashing"]


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["enough"], 0),
        (["elsewhere"], 0),
        (["too-slow"], 1),
        (["crashing"], 1),
        (["enough", "too-slow"], 1),
        ([], 1),
    ],
)
def test_exit_codes(names: list[str], code: int, results: Path) -> None:
    assert main(names, [enough, elsewhere, too_slow, crashing], results, _environment) == code


def test_a_missed_bar_is_recorded_as_missed(setting: Setting, results: Path) -> None:
    run_checks([too_slow], setting, results, _environment)
    assert [record.met for record in read_records(results)] == [False]


def test_only_the_named_checks_run(results: Path) -> None:
    main(["enough", "enough"], [enough, too_slow], results, _environment)
    assert [record.name for record in read_records(results)] == ["enough"]


def test_list_runs_nothing(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"], [enough, crashing], results, _environment) == 0
    assert capsys.readouterr().out == "enough    More than enough\ncrashing  Never returns\n"
    assert not results.exists()


def test_an_unknown_name_is_answered_with_the_nearest(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["enuogh"], [enough], results, _environment)
    assert exit_.value.code == 2
    assert "did you mean enough" in capsys.readouterr().err


def test_the_device_reaches_checks_that_can_use_it(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    main(["--device", "cuda"], [choosy, enough], results, _environment)
    with_choice, without = read_records(results)
    assert (with_choice.details["device"], with_choice.machine["device"]) == ("cuda", "cuda")
    assert with_choice.command == "python -m benchmarks choosy --device cuda"
    assert "device" not in without.machine
    assert without.command == "python -m benchmarks enough"


def test_without_a_gpu_a_cuda_check_cannot_run(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"], [choosy], results, _environment) == 0
    assert not results.exists()


def test_a_check_must_say_what_it_measures() -> None:
    with pytest.raises(ValueError, match="docstring"):

        @check(bar=0, direction="at least", unit="s")
        def silent(setting: Setting) -> Measurement:
            return Measurement(0)


def test_the_project_has_its_checks() -> None:
    assert {one.name for one in all_checks()} == {
        "adapter-load", "cache-noop", "checkpoint-size", "commonsense", "demo-gain", "demo-time", "e2e", "e2e-full",
        "eval-scaling", "faults", "glue", "method", "method-others", "packing", "plan", "regulariser", "retrain", "spectra-model", "spectra-weight",
        "train-step", "truncation", "truncation-training", "zero3-memory",
    }  # fmt: skip


def test_committed_records_belong_to_checks() -> None:
    known = {one.name: one for one in all_checks()}
    for record in read_records(RESULTS):
        one = known[record.name]
        assert (record.what, record.bar, record.direction, record.unit) == (
            one.what,
            one.bar,
            one.direction,
            one.unit,
        ), f"{record.name} has changed since it was measured; run python -m benchmarks {record.name}"


# The quickstart's checks, on results as `kasa run --json` gives them.


def _result(folder: Path, status: str, low: float = 0.012) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"facts": {"rows": 400}}), encoding="utf-8")
    stages = ("prepare", "spectra", "audit", "train", "evaluate", "register")
    return {
        "stages": dict.fromkeys(stages, status),
        "seconds": {**dict.fromkeys(stages, 1.0), "total": 5.0},
        "artifacts": {"evaluate": str(folder)},
        "metrics": {
            "base": {"loss": 1.0, "perplexity": 2.7, "accuracy": 0.6},
            "adapted": {"loss": 0.4, "perplexity": 1.5, "accuracy": 0.64},
        },
        "differences": {
            "base": {
                "loss": {"estimate": -0.6, "low": -0.7, "high": -0.5},
                "accuracy": {"estimate": 0.04, "low": low, "high": 0.07},
            }
        },
    }


@pytest.mark.parametrize(("low", "met"), [(0.012, True), (0.0, False), (-0.01, False)])
def test_the_gain_is_judged_by_its_lower_end(low: float, met: bool, tmp_path: Path) -> None:
    measurement = quickstart.gain_of(_result(tmp_path, "computed", low))
    assert measurement.measured == pytest.approx(4)
    assert judge(quickstart.demo_gain, measurement) == (pytest.approx(100 * low), met)
    assert measurement.details["interval_points"] == pytest.approx([100 * low, 7])
    assert measurement.details["heldout_rows"] == 400
    assert measurement.details["base"] == {"accuracy": 0.6, "loss": 1.0}


def test_the_cold_run_is_apart_and_the_second_run_follows_another(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Path] = []

    def run(workspace: Path) -> tuple[dict[str, Any], float]:
        runs.append(workspace)
        is_new = runs.count(workspace) == 1
        return _result(workspace / "evaluate", "computed" if is_new else "reused"), 300.0 if is_new else 12.0

    monkeypatch.setattr(quickstart, "_run_quickstart", run)
    monkeypatch.setattr(quickstart, "fetch", lambda recipe, workspace: None)
    cold, again = quickstart.demo_time.measure(setting), quickstart.cache_noop.measure(setting)
    assert runs[0].is_relative_to(setting.scratch)
    assert runs[1:] == [setting.workspace] * 2
    assert [(m.measured, m.flaws) for m in (cold, again)] == [(300.0, ()), (12.0, ())]
    assert cold.details["stage_seconds"]["train"] == 1.0


def test_cache_noop_alone_makes_the_first_run_itself(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Path] = []

    def run(workspace: Path) -> tuple[dict[str, Any], float]:
        runs.append(workspace)
        return _result(workspace / "evaluate", "computed"), 1.0

    monkeypatch.setattr(quickstart, "_run_quickstart", run)
    monkeypatch.setattr(quickstart, "fetch", lambda recipe, workspace: None)
    measurement = quickstart.cache_noop.measure(setting)
    assert len(runs) == 2
    assert "train was computed, not reused" in measurement.flaws
    assert not judge(quickstart.cache_noop, measurement)[1]


@pytest.mark.parametrize(("second", "flaws"), [("unchanged", 0), ("retrained", 1)])
def test_a_retraining_with_nothing_new_is_timed_and_must_find_nothing(
    second: str, flaws: int, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = [("retrained", 90.0), ("unchanged", 0.5), (second, 0.75), ("unchanged", 0.5), ("unchanged", 0.25)]

    def tick(*arguments: str) -> tuple[dict[str, Any], float]:
        assert arguments[0] == "retrain"
        status, seconds = ticks.pop(0)
        return {"status": status}, seconds

    monkeypatch.setattr(quickstart, "kasa_command", tick)
    monkeypatch.setattr(quickstart, "fetch", lambda recipe, workspace: None)
    measurement = quickstart.retrain.measure(setting)
    assert (measurement.measured, len(measurement.flaws), ticks) == (0.75, flaws, [])


def test_a_missing_stage_is_a_flaw(tmp_path: Path) -> None:
    result = _result(tmp_path, "reused")
    del result["stages"]["register"]
    assert quickstart.unlike(result, "reused") == ("register was missing, not reused",)


def test_a_cold_workspace_holds_the_downloads_only(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    for name in ("sources/base/config.json", "sources/.base.lock", "artifacts/train/x"):
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).touch()
    copy_sources(workspace, tmp_path / "cold")
    files = [file.relative_to(tmp_path / "cold") for file in (tmp_path / "cold").rglob("*") if file.is_file()]
    assert files == [Path("sources/base/config.json")]
    copy_sources(tmp_path / "nowhere", tmp_path / "colder")
    assert not list((tmp_path / "colder").iterdir())


def test_the_quickstart_is_where_the_checks_look_for_it() -> None:
    assert (ROOT / quickstart.RECIPE).is_file()


def test_one_weight_is_timed_and_its_error_is_that_of_the_dropped_part() -> None:
    found = adapter_start.time_weight(64, 96)
    assert min(found["seconds"], found["product_seconds"], found["svd_seconds"]) > 0
    assert found["error"] < 1e-4
    assert found["svd_error"] < 1e-2
    weight, exact = adapter_start.planted(64, 96)
    assert torch.linalg.matrix_rank(exact) == adapter_start.RANK
    assert torch.linalg.svdvals(weight.double() - exact)[-adapter_start.RANK :].max() < 1e-6


# The figures in the documentation.


def _page(name: str) -> str:
    return f"# Title\n\nAbove.\n\n<!-- {name}:start -->\nold\n<!-- {name}:end -->\n\nBelow.\n"


@pytest.fixture
def pages(tmp_path: Path, results: Path) -> Path:
    """Both pages with old figures, and records of the chosen ones."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").write_text(_page("benchmarks"), encoding="utf-8")
    (tmp_path / "README.md").write_text(_page("figures"), encoding="utf-8")
    for name in table.FIGURES:
        write_record(_record(name=name), results)
    return tmp_path


def _arguments(pages: Path) -> list[str]:
    return ["--pages", str(pages), "--results", str(pages / "results")]


def test_the_block_is_a_table_of_the_records() -> None:
    records = [
        _record(),
        _record(too_slow, met=False, judges="the slowest"),
        _record(choosy, machine={"processor": "Abacus", "cores": "1", "gpus": "Beads", "device": "cuda"}),
    ]
    lines = table.all_records([replace(record, date="2026-01-02T03:04:05+00:00") for record in records], "results")
    assert lines == [
        "",
        "| check | what | measured | bar | met | machine | date |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| [`enough`](results/enough.json) | More than enough | 12.5 points | at least 10 points | yes |"
        " Abacus \\| 9, 2 cores | 2026-01-02 |",
        "| [`too-slow`](results/too-slow.json) | Slower than it should be | 11 s | the slowest at most 10 s"
        " | **no** | Abacus \\| 9, 2 cores | 2026-01-02 |",
        "| [`choosy`](results/choosy.json) | Computes where it is told | 1 points | more than 0 points | yes |"
        " Beads; Abacus, 1 core | 2026-01-02 |",
        "",
    ]


@pytest.mark.parametrize(
    ("page", "name", "header", "link"),
    [
        ("docs/benchmarks.md", "benchmarks", "check", "(../results/plan.json)"),
        ("README.md", "figures", "what", "(results/plan.json)"),
    ],
)
def test_the_pages_are_rewritten_between_their_markers(
    page: str, name: str, header: str, link: str, pages: Path, results: Path
) -> None:
    assert table.main([*_arguments(pages), "--check"]) == 1
    assert (pages / page).read_text(encoding="utf-8") == _page(name)
    assert table.main(_arguments(pages)) == 0
    text = (pages / page).read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n\nAbove.\n\n<!-- {name}:start -->\n\n| {header} |")
    assert text.endswith(f" |\n\n<!-- {name}:end -->\n\nBelow.\n")
    assert "old" not in text
    assert link in text
    assert table.main([*_arguments(pages), "--check"]) == 0
    write_record(_record(name="plan", measured=13.0), results)
    assert table.main([*_arguments(pages), "--check"]) == 1


def test_the_readme_has_the_chosen_figures_in_their_order(pages: Path, results: Path) -> None:
    write_record(_record(), results)
    table.main(_arguments(pages))
    rows = [line for line in (pages / "README.md").read_text().splitlines() if line.startswith("| More than enough")]
    assert [row.partition("[`")[2].partition("`]")[0] for row in rows] == list(table.FIGURES)
    (results / "plan.json").unlink()
    assert table.main(_arguments(pages)) == 2


def test_without_records_the_block_is_empty() -> None:
    block, page = table.BLOCKS[0], _page("benchmarks")
    assert block.filled(page, table.all_records([], "results")) == page.replace("old\n", "")


@pytest.mark.parametrize("page", ["docs/benchmarks.md", "README.md"])
@pytest.mark.parametrize("damage", ["", "{start}", "{end}\n{start}\n", "{start}{end}{start}{end}"])
def test_a_page_without_a_block_is_an_error(damage: str, page: str, pages: Path) -> None:
    name = "figures" if page == "README.md" else "benchmarks"
    text = damage.format(start=f"<!-- {name}:start -->", end=f"<!-- {name}:end -->")
    (pages / page).write_text(text, encoding="utf-8")
    assert table.main(_arguments(pages)) == 2
    assert (pages / page).read_text(encoding="utf-8") == text


def test_a_damaged_record_is_named(pages: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "enough.json").write_text('{"name": "enough"', encoding="utf-8")
    assert table.main(_arguments(pages)) == 2
    assert "enough.json is no benchmark record" in capsys.readouterr().err


def test_the_committed_figures_are_current() -> None:
    assert table.main(["--check"]) == 0, "run python -m benchmarks.table"


def test_a_record_on_disk_has_every_field(results: Path) -> None:
    stored = json.loads(write_record(_record(), results).read_text(encoding="utf-8"))
    assert list(stored) == [field.name for field in fields(Record)] == list(asdict(_record()))
