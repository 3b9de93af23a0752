"""What a check is, how checks are run, and what a run leaves behind: `benchmarks/results/NAME.json`."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.core.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Direction = Literal["at least", "at most", "more than", "less than"]
Device = Literal["cpu", "cuda"]

_HOLDS: dict[Direction, Callable[[float, float], bool]] = {
    "at least": lambda value, bar: value >= bar,
    "at most": lambda value, bar: value <= bar,
    "more than": lambda value, bar: value > bar,
    "less than": lambda value, bar: value < bar,
}


class CannotRunError(Exception):
    """This machine lacks what the check needs; the message says what."""


@dataclass(frozen=True)
class Setting:
    """Where checks run.

    Attributes:
        workspace: holds the downloaded base and data, and perhaps a finished run.
        scratch: a folder for the time of this command, shared by its checks.
        device: what a check that can choose computes on.
    """

    workspace: Path
    scratch: Path
    device: Device = "cpu"


@dataclass(frozen=True)
class Measurement:
    """What a check found.

    Attributes:
        measured: the figure that is claimed.
        details: JSON values worth keeping beside it.
        judged: what is held against the bar, where that is not the figure itself (the end of its interval, say).
        flaws: reasons why the bar is missed whatever the figure says.
    """

    measured: float
    details: dict[str, Any] = field(default_factory=dict)
    judged: float | None = None
    flaws: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """A named claim with its bar.

    Attributes:
        what: the claim's subject in one line.
        judges: what `Measurement.judged` is, where the check gives one.
        uses_device: whether `--device` means anything to it.
    """

    name: str
    what: str
    measure: Callable[[Setting], Measurement]
    bar: float
    direction: Direction
    unit: str
    judges: str = ""
    uses_device: bool = False


@dataclass(frozen=True)
class Record:
    """A check's newest result, as it is stored."""

    name: str
    what: str
    measured: float
    bar: float
    direction: Direction
    judges: str
    judged: float
    met: bool
    unit: str
    command: str
    machine: dict[str, str]
    versions: dict[str, str]
    date: str
    details: dict[str, Any] = field(default_factory=dict)


Environment = Callable[[], tuple[dict[str, str], dict[str, str]]]


def check(
    *, bar: float, direction: Direction, unit: str, judges: str = "", uses_device: bool = False
) -> Callable[[Callable[[Setting], Measurement]], Check]:
    """Make a function a check, named after it (`demo_gain` is `demo-gain`); its docstring's first line says what it
    measures."""

    def make(measure: Callable[[Setting], Measurement]) -> Check:
        name = getattr(measure, "__name__", "").replace("_", "-")
        what = (measure.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        if not what:
            raise ValueError(f"check {name} needs a docstring that says what it measures")
        return Check(name, what, measure, bar, direction, unit, judges, uses_device)

    return make


def run_checks(
    checks: Iterable[Check], setting: Setting, results: Path = RESULTS, environment: Environment | None = None
) -> int:
    """Run checks one after another, whatever becomes of the others; exit code 1 if a bar was missed or one crashed."""
    outcomes = [_run_check(one, setting, results, environment or describe_environment) for one in checks]
    return 0 if all(outcomes) else 1


def judge(one: Check, measurement: Measurement) -> tuple[float, bool]:
    """The number held against the bar, and whether the bar is met."""
    judged = measurement.measured if measurement.judged is None else measurement.judged
    return judged, not measurement.flaws and _HOLDS[one.direction](judged, one.bar)


def make_record(one: Check, measurement: Measurement, setting: Setting, environment: Environment) -> Record:
    """The record of a measurement made just now.

    Raises:
        ValueError: the figure is NaN or infinite.
    """
    judged, met = judge(one, measurement)
    if not (math.isfinite(measurement.measured) and math.isfinite(judged)):
        raise ValueError(f"{one.name} measured {measurement.measured}, judged {judged}: no finite number")
    machine, versions = environment()
    device = {"device": setting.device} if one.uses_device else {}
    flaws = {"flaws": list(measurement.flaws)} if measurement.flaws else {}
    return Record(
        name=one.name,
        what=one.what,
        measured=measurement.measured,
        bar=one.bar,
        direction=one.direction,
        judges=one.judges,
        judged=judged,
        met=met,
        unit=one.unit,
        command=f"python -m benchmarks {one.name}" + (f" --device {setting.device}" if one.uses_device else ""),
        machine={**machine, **device},
        versions=versions,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        details={**measurement.details, **flaws},
    )


def write_record(record: Record, results: Path = RESULTS) -> Path:
    """Store a record in place of an older one of its name."""
    path = results / f"{record.name}.json"
    atomic_write(path, json.dumps(asdict(record), indent=2, allow_nan=False) + "\n")
    return path


def read_records(results: Path = RESULTS) -> list[Record]:
    """All records, by name.

    Raises:
        ValueError: a file is no record.
    """
    records = []
    for path in sorted(results.glob("*.json")):
        try:
            records.append(Record(**json.loads(path.read_text(encoding="utf-8"))))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no benchmark record: {error}; measure it again or delete it") from None
    return records


def describe_environment() -> tuple[dict[str, str], dict[str, str]]:
    """(machine, versions): the hardware and the installed packages, without any name of the host."""
    import platform

    from pipeline.core.machine import cpu_cores, memory_gib
    from pipeline.run.report_facts import environment_tags

    tags = environment_tags()
    machine = {name.removeprefix("kasa.machine."): tags[name] for name in tags if name.startswith("kasa.machine.")}
    versions = {name.removeprefix("kasa.version."): tags[name] for name in tags if name.startswith("kasa.version.")}
    # A kernel's full release names the host's provider.
    machine |= {"cores": str(cpu_cores()), "system": f"{platform.system()} {platform.machine()}"}
    if memory := memory_gib():
        machine["memory_gib"] = f"{memory[0]:.0f}"
    return machine, {"python": machine.pop("python"), **versions}


def bar_text(record: Record) -> str:
    """The bar in words: `at most 600 s`."""
    bar = f"{record.direction} {with_unit(record.bar, record.unit)}"
    return f"{record.judges} {bar}" if record.judges else bar


def with_unit(value: float, unit: str) -> str:
    """A number to four digits with its unit."""
    return f"{value:.4g} {unit}".strip()


def _run_check(one: Check, setting: Setting, results: Path, environment: Environment) -> bool:
    """Whether nothing speaks against the claim: met, or not measurable here."""
    print(f"{one.name}: {one.what}", file=sys.stderr, flush=True)
    try:
        _check_device(one, setting)
        record = make_record(one, one.measure(setting), setting, environment)
        path = write_record(record, results)
    except CannotRunError as reason:
        print(f"{one.name}: cannot run here: {reason}", flush=True)
        return True
    except Exception:
        traceback.print_exc()
        print(f"{one.name}: crashed", flush=True)
        return False
    print(_outcome(record, path), flush=True)
    return record.met


def _check_device(one: Check, setting: Setting) -> None:
    if one.uses_device and setting.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise CannotRunError("--device cuda, but torch finds no CUDA device")


def _outcome(record: Record, path: Path) -> str:
    verdict = "met" if record.met else "MISSED"
    flaws: Sequence[str] = record.details.get("flaws", ())
    why = f" ({'; '.join(flaws)})" if flaws else ""
    figure = with_unit(record.measured, record.unit)
    return f"{record.name}: {figure}; bar: {bar_text(record)}: {verdict}{why}; {path}"
