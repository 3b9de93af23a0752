"""The table of figures in README.md, made from the records: `python -m benchmarks.readme [--check]`.

Exit codes: 0 written or current; 1 (`--check`) out of date; 2 there is no block to fill, or a record is damaged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.core import RESULTS, ROOT, Record, bar_text, read_records, with_unit

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
_HEADER = ("check", "what", "measured", "bar", "met", "machine", "date")


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the block, or only compare it."""
    parser = argparse.ArgumentParser("python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the block is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    try:
        old = options.readme.read_text(encoding="utf-8")
        new = with_block(old, block(read_records(options.results)))
    except (OSError, ValueError) as error:
        print(f"{options.readme}: {error}", file=sys.stderr)
        return 2
    if options.check and new != old:
        print(f"{options.readme} is out of date: run python -m benchmarks.readme", file=sys.stderr)
        return 1
    if new != old:
        options.readme.write_text(new, encoding="utf-8")
    return 0


def with_block(text: str, lines: Sequence[str]) -> str:
    """`text` with the lines between its two markers replaced.

    Raises:
        ValueError: the markers are missing, repeated or in the wrong order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"needs one {START} and, below it, one {END}")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    return before + "\n".join([START, *lines, END]) + after


def block(records: Sequence[Record]) -> list[str]:
    """The lines of the table, one record a row; none without records."""
    if not records:
        return []
    rows = [_HEADER, ("---",) * len(_HEADER), *(_row(record) for record in records)]
    return ["", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _row(record: Record) -> tuple[str, ...]:
    cells = (
        f"[`{record.name}`](benchmarks/results/{record.name}.json)",
        record.what,
        with_unit(record.measured, record.unit),
        bar_text(record),
        "yes" if record.met else "**no**",
        machine_text(record),
        record.date[:10],
    )
    return tuple(cell.replace("|", "\\|") for cell in cells)


def machine_text(record: Record) -> str:
    """The hardware in a few words; GPUs only where the check used them."""
    cores = record.machine["cores"]
    text = f"{record.machine['processor']}, {cores} {'core' if cores == '1' else 'cores'}"
    return f"{record.machine['gpus']}; {text}" if record.machine.get("device") == "cuda" else text


if __name__ == "__main__":
    sys.exit(main())
