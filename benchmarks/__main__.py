"""`python -m benchmarks [NAME ...] [--list] [--device cpu|cuda] [--workspace FOLDER]`.

Exit codes: 0 every bar met (a check that cannot run here counts for nothing); 1 a bar missed or a check crashed; 2 wrong
usage.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.checks import all_checks
from benchmarks.core import RESULTS, Check, Environment, Setting, run_checks
from kasa.errors import nearest


def main(
    argv: Sequence[str] | None = None,
    checks: Sequence[Check] | None = None,
    results: Path = RESULTS,
    environment: Environment | None = None,
) -> int:
    """Run what the command line names; `checks`, `results` and `environment` stand in for the real ones in tests."""
    checks = all_checks() if checks is None else checks
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        width = max(len(one.name) for one in checks)
        print("\n".join(f"{one.name:{width}}  {one.what}" for one in checks))
        return 0
    by_name = {one.name: one for one in checks}
    for name in options.names:
        if name not in by_name:
            parser.error(f"there is no check {name}{nearest(name, by_name) or '; --list names them'}")
    chosen = [by_name[name] for name in dict.fromkeys(options.names)] or checks
    with tempfile.TemporaryDirectory(prefix="kasa-benchmarks-") as scratch:
        setting = Setting(options.workspace.resolve(), Path(scratch), options.device)
        return run_checks(chosen, setting, results, environment)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Measure the project's claims.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which checks; default: all")
    parser.add_argument("--list", action="store_true", help="list the checks and run none")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for the checks that can use it")
    parser.add_argument(
        "--workspace",
        type=Path,
        default=Path("workspace"),
        help="holds the downloaded base and data; a finished `make demo` in it is reused",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
