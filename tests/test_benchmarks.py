"""The machinery of the benchmarks, with stand-ins for what takes minutes."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import readme
from benchmarks.__main__ import main
from benchmarks.checks import all_checks, demo, interchange, spectra
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
    assert [file.name for file in results.iterdir()] == [path.name]


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
    names = [one.name for one in all_checks()]
    expected = {
        "demo-gain",
        "demo-time",
        "cache-noop",
        "spectra-model",
        "spectra-weight",
        "parity",
        "export-lora",
        "export-merged",
        "plan",
    }
    assert expected <= set(names)


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
    measurement = demo.gain_of(_result(tmp_path, "computed", low))
    assert measurement.measured == pytest.approx(4)
    assert judge(demo.demo_gain, measurement) == (pytest.approx(100 * low), met)
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

    monkeypatch.setattr(demo, "_run_quickstart", run)
    monkeypatch.setattr(demo, "_fetch_inputs", lambda workspace: None)
    cold, again = demo.demo_time.measure(setting), demo.cache_noop.measure(setting)
    assert runs[0].is_relative_to(setting.scratch)
    assert runs[1:] == [setting.workspace] * 2
    assert [(m.measured, m.flaws) for m in (cold, again)] == [(300.0, ()), (12.0, ())]
    assert cold.details["stage_seconds"]["train"] == 1.0


def test_cache_noop_alone_makes_the_first_run_itself(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Path] = []

    def run(workspace: Path) -> tuple[dict[str, Any], float]:
        runs.append(workspace)
        return _result(workspace / "evaluate", "computed"), 1.0

    monkeypatch.setattr(demo, "_run_quickstart", run)
    monkeypatch.setattr(demo, "_fetch_inputs", lambda workspace: None)
    measurement = demo.cache_noop.measure(setting)
    assert len(runs) == 2
    assert "train was computed, not reused" in measurement.flaws
    assert not judge(demo.cache_noop, measurement)[1]


def test_a_missing_stage_is_a_flaw(tmp_path: Path) -> None:
    result = _result(tmp_path, "reused")
    del result["stages"]["register"]
    assert demo.unlike(result, "reused") == ("register was missing, not reused",)


def test_a_cold_workspace_holds_the_downloads_only(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    for name in ("sources/base/config.json", "sources/.base.lock", "artifacts/train/x"):
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).touch()
    demo.copy_sources(workspace, tmp_path / "cold")
    files = [file.relative_to(tmp_path / "cold") for file in (tmp_path / "cold").rglob("*") if file.is_file()]
    assert files == [Path("sources/base/config.json")]
    demo.copy_sources(tmp_path / "nowhere", tmp_path / "colder")
    assert not list((tmp_path / "colder").iterdir())


def test_the_quickstart_is_where_the_checks_look_for_it() -> None:
    assert (ROOT / demo.RECIPE).is_file()


def test_one_weight_is_timed_and_its_error_is_that_of_the_dropped_part() -> None:
    found = spectra.time_weight(64, 96)
    assert min(found["seconds"], found["product_seconds"], found["svd_seconds"]) > 0
    assert found["error"] < 1e-4
    assert found["svd_error"] < 1e-2
    weight, exact = spectra.planted(64, 96)
    assert torch.linalg.matrix_rank(exact) == spectra.RANK
    assert torch.linalg.svdvals(weight.double() - exact)[-spectra.RANK :].max() < 1e-6


@pytest.mark.parametrize("shape", [(40, 40), (64, 40), (40, 64)])
def test_parity_of_one_layer(shape: tuple[int, int]) -> None:
    layer = interchange.layer_differences(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    measurement = interchange.parity_of({"layer": layer})
    assert judge(interchange.parity, measurement)[1], measurement
    assert 0 < layer["fp64"] < layer["fp64_with_another_svd"] < layer["fp32"] < layer["peft_to_reference"]


def test_parity_is_judged_by_the_worst_layer_and_both_references() -> None:
    good = {"peft": 1e-6, "fp32": 1e-7, "fp64": 1e-15, "peft_to_reference": 1e-6}
    measurement = interchange.parity_of({"one": good, "two": {**good, "peft": 3e-6, "fp32": 2e-5}})
    assert measurement.measured == 3e-6
    assert measurement.flaws == ("2.0e-05 from the fp64 reference in fp32, not 1e-05",)
    assert not judge(interchange.parity, measurement)[1]


def test_an_export_is_judged_on_a_sane_model_with_all_weights() -> None:
    sane = {"fp32": 1e-6, "adapter_changes_logits": 0.4}
    rules = {"activation": sane, "weight": {"fp32": 1e-4, "adapter_changes_logits": 1.2}}
    assert judge(interchange.export_lora, interchange.export_of(rules, 210)) == (1e-6, True)
    assert interchange.export_of(rules, 30).flaws == ("30 weights, not 210",)
    dead = {**rules, "activation": {"fp32": 0.0, "adapter_changes_logits": 1e-7}}
    assert interchange.export_of(dead, 210).flaws == ("the adapter changes the logits by 1.0e-07 only",)


def test_a_difference_is_relative_to_the_largest_value() -> None:
    theirs = [torch.tensor([1.0, -8.0]), torch.tensor([2.0])]
    assert interchange.difference([torch.tensor([1.0, -7.0]), torch.tensor([4.0])], theirs) == 0.25


# The figures in the README.

_SAMPLE = f"# Title\n\nAbove.\n\n{readme.START}\nold\n{readme.END}\n\nBelow.\n"


def test_the_block_is_a_table_of_the_records() -> None:
    records = [
        _record(),
        _record(too_slow, met=False, judges="the slowest"),
        _record(choosy, machine={"processor": "Abacus", "cores": "1", "gpus": "Beads", "device": "cuda"}),
    ]
    lines = readme.block([replace(record, date="2026-01-02T03:04:05+00:00") for record in records])
    assert lines == [
        "",
        "| check | what | measured | bar | met | machine | date |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| [`enough`](benchmarks/results/enough.json) | More than enough | 12.5 points | at least 10 points | yes |"
        " Abacus \\| 9, 2 cores | 2026-01-02 |",
        "| [`too-slow`](benchmarks/results/too-slow.json) | Slower than it should be | 11 s | the slowest at most 10 s"
        " | **no** | Abacus \\| 9, 2 cores | 2026-01-02 |",
        "| [`choosy`](benchmarks/results/choosy.json) | Computes where it is told | 1 points | more than 0 points | yes |"
        " Beads; Abacus, 1 core | 2026-01-02 |",
        "",
    ]


def test_the_readme_is_rewritten_between_its_markers(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(_SAMPLE, encoding="utf-8")
    write_record(_record(), results)
    arguments = ["--readme", str(page), "--results", str(results)]
    assert readme.main([*arguments, "--check"]) == 1
    assert page.read_text(encoding="utf-8") == _SAMPLE
    assert readme.main(arguments) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n\nAbove.\n\n{readme.START}\n\n| check |")
    assert text.endswith(f" |\n\n{readme.END}\n\nBelow.\n")
    assert "old" not in text
    assert readme.main([*arguments, "--check"]) == 0
    write_record(_record(measured=13.0), results)
    assert readme.main([*arguments, "--check"]) == 1


def test_without_records_the_block_is_empty(tmp_path: Path) -> None:
    assert readme.with_block(_SAMPLE, readme.block([])) == _SAMPLE.replace("old\n", "")


@pytest.mark.parametrize("text", ["", readme.START, f"{readme.END}\n{readme.START}\n", _SAMPLE * 2])
def test_a_readme_without_a_block_is_an_error(text: str, tmp_path: Path, results: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(text, encoding="utf-8")
    assert readme.main(["--readme", str(page), "--results", str(results)]) == 2
    assert page.read_text(encoding="utf-8") == text


def test_a_damaged_record_is_named(results: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(_SAMPLE, encoding="utf-8")
    results.mkdir()
    (results / "enough.json").write_text('{"name": "enough"', encoding="utf-8")
    assert readme.main(["--readme", str(tmp_path / "README.md"), "--results", str(results)]) == 2
    assert "enough.json is no benchmark record" in capsys.readouterr().err


def test_the_committed_figures_are_current() -> None:
    assert readme.main(["--check"]) == 0, "run python -m benchmarks.readme"


def test_a_record_on_disk_has_every_field(results: Path) -> None:
    stored = json.loads(write_record(_record(), results).read_text(encoding="utf-8"))
    assert list(stored) == [field.name for field in fields(Record)] == list(asdict(_record()))
